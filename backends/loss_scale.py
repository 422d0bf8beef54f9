"""What training in float16 needs: a scale of the loss, and a model whose hidden states it can hold."""

from __future__ import annotations

from backends.interface import NumberType

# float16 has no exponents below 2^-24: without a scale the gradients of a token, one of thousands in a step, would be
# zero. The scale is fixed, so that a step is a function of its rows and weights alone. A step that overflows at one
# scale is computed again at the next.
_FLOAT16 = (2.0**7, 2.0**3, 2.0**-1)
OUTGROWN = "this model's hidden states outgrow float16, which ends at 65,504; set model.dtype: bfloat16"


def loss_scales(number_type: NumberType, weights: float) -> tuple[float, ...]:
    """The scales to try in turn. weights: the sum of a step's, by which its loss is divided.

    bfloat16 has the exponents of float32, and needs none.
    """
    return tuple(scale * weights for scale in _FLOAT16) if number_type == "float16" else (1.0,)
