"""LoRA layers for torch: the frozen weight gets no gradient, and what is scaled and kept is the small product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from backends.interface import BackendError, LoraSpec

Parameters = dict[str, torch.nn.Parameter]


class Dropout:
    """Masks for the adapters' inputs: a function of seed, step, micro-batch and layer alone, and off outside a step."""

    def __init__(self, probability: float, seed: int) -> None:
        self.keep, self._seed = 1.0 - probability, seed
        self.place: tuple[int, int] | None = None  # step and micro-batch; None: not training

    def mask(self, layer: int, like: torch.Tensor) -> torch.Tensor | None:
        """True where an input is kept, or None where all are. [N, in]; N counts too: a prefix and its rows differ."""
        if self.place is None or self.keep == 1:
            return None
        entropy = np.random.SeedSequence((self._seed, *self.place, layer, len(like)))
        generator = torch.Generator(like.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        return torch.rand(like.shape, device=like.device, generator=generator) < self.keep


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """W x + b + scale * B A dropout(x); W may be 4-bit. A [r, in] and B [out, r] are float32 and act in x's type."""

    def __init__(self, base: torch.nn.Linear, lora: LoraSpec, dropout: Dropout, number: int) -> None:
        super().__init__()
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.base, self._scale = base, lora.scale
        self.lora_A = torch.nn.Parameter(torch.zeros(lora.rank, base.in_features, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, lora.rank, **like))
        self._dropout, self._number = dropout, number

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # [N, in]
        out: torch.Tensor = _Adapted.apply(flat, self.lora_A, self.lora_B, *self._how(flat))
        return out.unflatten(0, x.shape[:-1])

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """As of silu(gate) * up, which is not kept. [..., in] -> [..., out]"""
        flat = gate.flatten(0, -2)
        out: torch.Tensor = _Gated.apply(flat, up.flatten(0, -2), self.lora_A, self.lora_B, *self._how(flat))
        return out.unflatten(0, gate.shape[:-1])

    def _how(self, x: torch.Tensor) -> tuple[torch.Tensor | None, float, torch.nn.Linear]:
        mask = self._dropout.mask(self._number, x)
        return mask, self._scale / (1.0 if mask is None else self._dropout.keep), self.base


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """Keeps x [N, in] and scale * A x [N, r]; autograd would keep four products, one of them as wide as W x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *how: Any) -> torch.Tensor:
        out, kept = _product(ctx, x, a, b, *how)
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        return *_gradients(ctx, ctx.needs_input_grad[0], grad, x, *kept), None, None, None


class _Gated(torch.autograd.Function):  # type: ignore[misc]
    """The same of x = silu(gate) * up, which the backward pass computes again (SwiGLU; Shazeer, 2020)."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *how: Any
    ) -> torch.Tensor:
        out, kept = _product(ctx, silu(gate).mul_(up), a, b, *how)
        ctx.save_for_backward(gate, up, *kept)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        gate, up, *kept = ctx.saved_tensors
        active = silu(gate)
        by_x, by_a, by_b = _gradients(ctx, any(ctx.needs_input_grad[:2]), grad, active * up, *kept)
        by_gate = by_up = None
        if by_x is not None:
            by_up = active.mul_(by_x)
            by_gate = torch.ops.aten.silu_backward(by_x.mul_(up), gate)
        return by_gate, by_up, by_a, by_b, None, None, None


def _product(
    ctx: Any,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    base: torch.nn.Linear,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """W x + scale * B A x, and what its gradient needs beside x."""
    ctx.scale, ctx.base = scale, base
    a, b = a.to(x.dtype), b.to(x.dtype)
    small = (_dropped(x, mask) @ a.T).mul_(scale)  # [N, r]
    out: torch.Tensor = base(x)
    return out.addmm_(small, b.T), (a, b, small, mask)


def _gradients(
    ctx: Any,
    by_x: bool,
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    small: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """By x (if wanted), A and B; of the frozen weight there is none."""
    back = (grad @ b).mul_(ctx.scale)  # [N, r]
    by_a, by_b = (back.T @ _dropped(x, mask)).float(), (grad.T @ small).float()
    if not by_x:
        return None, by_a, by_b
    whole = grad @ dense(ctx.base, grad.dtype)  # [N, in]
    return whole.addmm_(back, a) if mask is None else whole.add_((back @ a).mul_(mask)), by_a, by_b


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


def dense(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight [out, in] as numbers."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(linear.weight.data, state)
    return weight.to(dtype)


def add_adapter(model: Any, modules: Mapping[str, tuple[int, int]], lora: LoraSpec, dropout: Dropout) -> Parameters:
    """LoRA on exactly `modules` -> (out, in); the float32 tensors by canonical name, in the order of `modules`.

    Raises BackendError when a module is not there, is not a linear layer or has another shape.
    """
    parameters: Parameters = {}
    wrong: list[str] = []
    names = [name for name, _ in model.named_modules()]
    for number, (module, (outputs, inputs)) in enumerate(modules.items()):
        place = _locate(names, module)
        base = model.get_submodule(place)
        if not isinstance(base, torch.nn.Linear) or (base.out_features, base.in_features) != (outputs, inputs):
            wrong.append(module)
            continue
        layer = LoraLinear(base, lora, dropout, number)
        model.set_submodule(place, layer)
        parameters |= {f"{module}.lora_A": layer.lora_A, f"{module}.lora_B": layer.lora_B}
    if wrong:
        raise BackendError(f"these modules cannot be adapted as the checkpoint's shapes say: {', '.join(wrong)}")
    return parameters


def _locate(names: list[str], module: str) -> str:
    """The name in the live model of a module as the checkpoint names it; wrappers may have changed its beginning."""
    if module in names:
        return module
    tail = module[module.index("layers.") :]
    matches = [name for name in names if name == tail or name.endswith(f".{tail}")]
    if len(matches) != 1:
        raise BackendError(f"{module} is in the checkpoint but not in the model that transformers makes of it")
    return matches[0]
