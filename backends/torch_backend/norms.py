"""RMS norms with a hand-written gradient: of each only the input and one number per position is saved.

x / sqrt(mean(x^2) + eps) * gain (Zhang & Sennrich, 2019), computed in float32. Models differ in the gain, and in
whether it multiplies before or after the result is rounded to the model's type.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from backends.torch_backend.fused import kernels_for
from backends.torch_backend.patch import is_coded_as, same_code
from backends.torch_backend.products import Again, Source


class Gain(NamedTuple):
    """What a norm's result is multiplied by: its weight and what is added to it."""

    added: float = 0.0
    rounded_first: bool = False  # whether the result is rounded to the model's type before


# Not imported here: that takes a while, and the models of these families have done it.
_OF_ONE_FAMILY = {"gemma4.modeling_gemma4": "Gemma4RMSNorm", "nemotron_h.modeling_nemotron_h": "NemotronHRMSNorm"}


def use_own_norm(module: Any, norms: Mapping[type, Gain]) -> bool:
    """Computes the module here, if it is a frozen norm that is coded as one of these, whatever its name."""
    gain = next((gain for known, gain in norms.items() if _is(module, known)), None)
    weight = getattr(module, "weight", None)  # some have none
    if gain is None or (weight is not None and weight.requires_grad):
        return False
    module.forward = partial(_norm, module, gain)
    return True


def known_norms() -> dict[type, Gain]:
    """Those of the models that were made in this process."""
    known = {LlamaRMSNorm: Gain(rounded_first=True), Olmo2RMSNorm: Gain(), Gemma2RMSNorm: Gain(added=1.0)}
    for module, name in _OF_ONE_FAMILY.items():
        if home := sys.modules.get(f"transformers.models.{module}"):
            known[getattr(home, name)] = Gain()
    return known


def _is(module: Any, known: Any) -> bool:
    helpers = [getattr(kind, "_norm", None) for kind in (type(module), known)]
    return is_coded_as(module, known) and (helpers == [None, None] or same_code(*helpers))


def _norm(module: Any, gain: Gain, x: torch.Tensor) -> torch.Tensor:
    """x [..., D] -> [..., D]"""
    weight = getattr(module, "weight", None)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if (
        gain.rounded_first and x.is_cuda and weight is not None
    ):  # one kernel each way that saves as little (torch 2.9 and newer)
        make = partial(torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        kept: tuple[torch.Tensor, ...] = (x,)
        out: torch.Tensor = make(x)
    else:
        out, inverse_rms = _RmsNorm.apply(x, weight, eps, gain)
        make, kept = partial(_again, weight=weight, eps=eps, gain=gain), (x, inverse_rms)
    if torch.is_grad_enabled():
        out.source = Source(kept, Again(make))  # so that adapted layers need not keep `out`
    return out


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """The result, and 1 / sqrt(mean(x^2) + eps) of each position [..., 1]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain: Gain
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (kernels := _kernels(x, weight, gain)) is not None:
            out, inverse_rms = kernels.rms_norm(x, weight, eps, gain.added)
        else:
            inverse_rms = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            out = _normed(x, inverse_rms, weight, gain)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.gain = gain
        ctx.mark_non_differentiable(inverse_rms)
        return out, inverse_rms

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple[Any, ...]:
        (x, weight, inverse_rms), gain = ctx.saved_tensors, ctx.gain
        if (kernels := _kernels(x, weight, gain)) is not None:
            return kernels.rms_norm_back(x, weight, inverse_rms, grad_output, gain.added), None, None, None
        normed = x.float() * inverse_rms
        grad = _multiplied(grad_output, weight, gain).float()
        projection = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, projection, value=-1).mul_(inverse_rms).to(x.dtype), None, None, None


def _again(
    x: torch.Tensor, inverse_rms: torch.Tensor, weight: torch.Tensor | None, eps: float, gain: Gain
) -> torch.Tensor:
    if (kernels := _kernels(x, weight, gain)) is None:
        return _normed(x, inverse_rms, weight, gain)
    again: torch.Tensor = kernels.rms_norm(x, weight, eps, gain.added)[0]
    return again


def _normed(x: torch.Tensor, inverse_rms: torch.Tensor, weight: torch.Tensor | None, gain: Gain) -> torch.Tensor:
    normed = x.float() * inverse_rms
    return _multiplied(normed.to(x.dtype) if gain.rounded_first else normed, weight, gain).to(x.dtype)


def _multiplied(numbers: torch.Tensor, weight: torch.Tensor | None, gain: Gain) -> torch.Tensor:
    """Numbers [..., D] times the gain, in float32 unless they are rounded first."""
    if weight is None:
        return numbers
    return numbers * (weight if gain.rounded_first else weight.float() + gain.added)


def _kernels(x: torch.Tensor, weight: torch.Tensor | None, gain: Gain) -> Any | None:
    """Ours, which read rows that fill x's memory; None: torch's own operations it is."""
    filled = x.is_contiguous() or (x.ndim == 4 and x.transpose(1, 2).is_contiguous())  # of heads, in either order
    return kernels_for(x, x.shape[:-1].numel()) if filled and weight is not None and not gain.rounded_first else None
