"""The blocks' norms and gated layers with hand-written gradients, so that less is saved for the backward pass."""

from __future__ import annotations

import sys
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.import_utils import is_flash_linear_attention_available

from backends.predictions import DELTA_RULE
from backends.torch_backend.costs import DELTA_KERNEL, GATED_LAYERS, NORMS, ROTARY
from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.patch import is_coded_as
from backends.torch_backend.products import Again, Source
from backends.torch_backend.rotary import use_own_rotary

_DELTA_RULE = "torch_chunk_gated_delta_rule"  # the function, in transformers' module of each model that has it


def use_own_layers(model: Any) -> list[str]:
    """Modules whose code is Llama's, whatever their name, get the gradients written here. Returns the kinds."""
    silu, replaced = type(ACT2FN["silu"]), set()
    for module in model.modules():
        if is_coded_as(module, LlamaRMSNorm) and not module.weight.requires_grad:
            module.forward = partial(_norm, module)
            replaced.add(NORMS)
        elif (
            is_coded_as(module, LlamaMLP)
            and isinstance(module.act_fn, silu)
            and isinstance(module.down_proj, LoraLinear)  # a frozen one saves little as it is
        ):
            module.forward = partial(_gated_layer, module)
            replaced.add(GATED_LAYERS)
    return [*sorted(replaced, reverse=True), *([ROTARY] if use_own_rotary(model) else [])]


def delta_rule_of(model: Any) -> list[str]:
    """Which form of the gated delta rule transformers runs in this model: a library's kernels, or its own in chunks."""
    homes = {type(module).__module__ for module in model.modules()}
    functions = [getattr(sys.modules.get(home), _DELTA_RULE, None) for home in homes]
    kinds = {DELTA_KERNEL if _is_librarys(function) else DELTA_RULE for function in functions if function}
    return sorted(kinds)


def _is_librarys(function: Any) -> bool:
    """Whether transformers calls flash-linear-attention there: it decides so early, and older ones at each call."""
    chosen = getclosurevars(function).nonlocals.get("is_new_implementation")
    return is_flash_linear_attention_available() if chosen is None else bool(chosen)


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight, eps = module.weight, module.variance_epsilon
    if hidden_states.is_cuda:  # one kernel each way that saves as little (torch 2.9 and newer)
        make = partial(torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        kept: tuple[torch.Tensor, ...] = (hidden_states,)
        out: torch.Tensor = make(hidden_states)
    else:
        out, inverse_rms = _RmsNorm.apply(hidden_states, weight, eps)
        make, kept = partial(_normed, weight=weight), (hidden_states, inverse_rms)
    if torch.is_grad_enabled():
        out.source = Source(kept, Again(make))  # so that adapted layers need not keep `out`
    return out


def _gated_layer(module: Any, x: torch.Tensor) -> torch.Tensor:
    down: LoraLinear = module.down_proj
    return down.gated(module.gate_proj(x), module.up_proj(x))


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """w * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich, 2019) in float32. Saves x and one number per position."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        inverse_rms = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return _normed(x, inverse_rms, weight), inverse_rms

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple[Any, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed, grad_normed = x.float() * inverse_rms, (grad_output * weight).float()
        projection = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.addcmul_(normed, projection, value=-1).mul_(inverse_rms).to(x.dtype), None, None


def _normed(x: torch.Tensor, inverse_rms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * inverse_rms).to(x.dtype).mul_(weight)
