"""activation(gate) * up, between the layers of a block that widen and the one that narrows (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from backends.torch_backend.fused import kernels_for

_aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of the gate, and what writes its gradient into a given tensor."""

    of: Callable[[torch.Tensor], torch.Tensor]
    to: Callable[..., torch.Tensor]  # (gate, out=)
    gradient: Callable[..., torch.Tensor]  # (gradient by the result, gate, grad_input=)
    gelu: bool


ACTIVATIONS = {
    "silu": Activation(functional.silu, _aten.silu.out, _aten.silu_backward.grad_input, False),
    "gelu_pytorch_tanh": Activation(
        partial(functional.gelu, approximate="tanh"),
        partial(_aten.gelu.out, approximate="tanh"),
        partial(_aten.gelu_backward.grad_input, approximate="tanh"),
        True,
    ),
}


def gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up [N, in]"""
    kernels = _kernels_of(gate, up)
    return activation.of(gate).mul_(up) if kernels is None else kernels.gated(gate, up, activation.gelu)


def gated_gradients(
    activation: Activation, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, product: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of gate and up [N, in]; `grad` and `product` are written over, since these are a block's widest tensors."""
    if (kernels := _kernels_of(gate, up)) is not None:
        kernels.gated_back(gate, up, grad, product, activation.gelu)
        return grad, product
    grad_up = activation.to(gate, out=product).mul_(grad)
    grad.mul_(up)
    return activation.gradient(grad, gate, grad_input=grad), grad_up


def _kernels_of(gate: torch.Tensor, up: torch.Tensor) -> Any | None:
    """Ours, which read both from end to end; None: torch's own operations it is."""
    return kernels_for(gate, len(gate)) if gate.is_contiguous() and up.is_contiguous() else None
