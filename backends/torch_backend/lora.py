"""LoRA layers for torch: the frozen weight gets no gradient, and what is scaled and saved is the low-rank product."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from backends import dropout
from backends.interface import BackendError, FloatArray, LoraSpec, Modules
from backends.text_blocks import ending

Parameters = dict[str, torch.nn.Parameter]


class Dropout:
    """The masks of `backends.dropout` for the adapters' inputs; off outside a step. Words are int32, which wraps."""

    def __init__(self, probability: float, seed: int, modules: Modules, device: torch.device) -> None:
        self.keep = dropout.kept_share(probability)
        self._limit, self._seed, self._names = dropout.limit(probability), seed, list(modules)
        words = {width: dropout.feature_words(width) for _, width in modules.values()} if probability else {}
        self._features = {width: _int32(word, device) for width, word in words.items()}
        self._modules = _int32(dropout.module_words(modules), device)[:, None]  # [M, 1]
        self._keys: torch.Tensor | None = None  # [M, N] of the tokens that are run now; None: not training

    def at(self, step: int, where: dropout.Places) -> None:
        """From here on the tokens at these places are run, in a step that comes after `step` others."""
        if self._features:
            tokens = _int32(dropout.token_words(self._seed, step, where), self._modules.device)
            self._keys = _mixed(self._modules ^ tokens)

    def off(self) -> None:
        self._keys = None

    def mask(self, module: int, x: torch.Tensor) -> torch.Tensor | None:
        """True where an input of x [N, in] is kept; None: all are. Raises BackendError where N is another."""
        if self._keys is None:
            return None
        tokens, width = x.shape
        keys = self._keys[module]
        if tokens != len(keys):
            raise BackendError(
                f"{self._names[module]} is run on {tokens} inputs for {len(keys)} tokens, so dropout does not know "
                "which is whose; set lora.dropout: 0, or leave the layer out of lora.targets"
            )
        words = _mixed(keys[:, None] ^ self._features[width])  # [N, ceil(in / 2)]
        return words.view(torch.int16)[:, :width] < self._limit


def _int32(words: dropout.Words, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32).copy()).to(device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """`dropout.mixed`, in place: x ^ (x >> 16) is the lower halves ^ the upper ones, in one pass."""
    halves = x.view(torch.int16)
    lower, upper = halves[..., 0::2], halves[..., 1::2]
    for _ in range(2):
        x.mul_(dropout.FACTOR)
        lower.bitwise_xor_(upper)
    return x


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """W x + b + scale * B A dropout(x); W may be 4-bit. A [r, in] and B [out, r] are float32 and act in x's type."""

    def __init__(self, base: torch.nn.Linear, lora: LoraSpec, masks: Dropout, number: int) -> None:
        super().__init__()
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.base, self._scale = base, lora.scale
        self.lora_A = torch.nn.Parameter(torch.zeros(lora.rank, base.in_features, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, lora.rank, **like))
        self._masks, self._number = masks, number

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # [N, in]
        out: torch.Tensor = _Adapted.apply(flat, self.lora_A, self.lora_B, *self._settings(flat))
        return out.unflatten(0, x.shape[:-1])

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The same with x = silu(gate) * up, which is not saved. [..., in] -> [..., out]"""
        flat = gate.flatten(0, -2)
        out: torch.Tensor = _Gated.apply(flat, up.flatten(0, -2), self.lora_A, self.lora_B, *self._settings(flat))
        return out.unflatten(0, gate.shape[:-1])

    def _settings(self, x: torch.Tensor) -> tuple[torch.Tensor | None, float, torch.nn.Linear]:
        """Dropout's mask, the scale with dropout's in it, and the frozen layer."""
        mask = self._masks.mask(self._number, x)
        return mask, self._scale / (1.0 if mask is None else self._masks.keep), self.base


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """Saves x [N, in] and scale * A x [N, r]; autograd would save four products, one of them as wide as W x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *settings: Any) -> torch.Tensor:
        out, saved = _output(ctx, x, a, b, *settings)
        ctx.save_for_backward(x, *saved)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        return *_gradients(ctx, ctx.needs_input_grad[0], grad_output, x, *saved), None, None, None


class _Gated(torch.autograd.Function):  # type: ignore[misc]
    """The same of x = silu(gate) * up, which the backward pass computes again (SwiGLU; Shazeer, 2020)."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *settings: Any
    ) -> torch.Tensor:
        out, saved = _output(ctx, silu(gate).mul_(up), a, b, *settings)
        ctx.save_for_backward(gate, up, *saved)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        gate, up, *saved = ctx.saved_tensors
        active = silu(gate)
        needed = any(ctx.needs_input_grad[:2])
        grad_input, grad_a, grad_b = _gradients(ctx, needed, grad_output, active * up, *saved)
        grad_gate = grad_up = None
        if grad_input is not None:
            grad_up = active.mul_(grad_input)
            grad_gate = torch.ops.aten.silu_backward(grad_input.mul_(up), gate)
        return grad_gate, grad_up, grad_a, grad_b, None, None, None


def _output(
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
    low_rank = (_dropped(x, mask) @ a.T).mul_(scale)  # [N, r]
    out: torch.Tensor = base(x)
    return out.addmm_(low_rank, b.T), (a, b, low_rank, mask)


def _gradients(
    ctx: Any,
    input_needed: bool,
    grad_output: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    low_rank: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """For x (if needed), A and B; the frozen weight has none."""
    grad_low_rank = (grad_output @ b).mul_(ctx.scale)  # [N, r]
    grad_a, grad_b = (grad_low_rank.T @ _dropped(x, mask)).float(), (grad_output.T @ low_rank).float()
    if not input_needed:
        return None, grad_a, grad_b
    grad_input = grad_output @ dense(ctx.base, grad_output.dtype)  # [N, in]
    if mask is None:
        return grad_input.addmm_(grad_low_rank, a), grad_a, grad_b
    return grad_input.add_((grad_low_rank @ a).mul_(mask)), grad_a, grad_b


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


def base_weight(model: Any, module: str) -> FloatArray:
    """`Session.base_weight`: of a layer by the name that the checkpoint has for it."""
    names = [name.removesuffix(".base") for name, layer in model.named_modules() if hasattr(layer, "weight")]
    layer = model.get_submodule(_live_name(sorted(set(names)), module))
    weight = dense(getattr(layer, "base", layer), torch.float32)
    numbers: FloatArray = weight.to("cpu", torch.float32).numpy().copy()
    return numbers


def add_adapter(model: Any, modules: Modules, lora: LoraSpec, masks: Dropout) -> Parameters:
    """LoRA on exactly `modules`; the float32 tensors by canonical name, in the order of `modules`.

    Raises BackendError when a module is missing, is not a linear layer or has another shape.
    """
    parameters: Parameters = {}
    wrong: list[str] = []
    names = [live for live, _ in model.named_modules()]
    for number, (module, (outputs, inputs)) in enumerate(modules.items()):
        name = _live_name(names, module)
        base = model.get_submodule(name)
        if not isinstance(base, torch.nn.Linear) or (base.out_features, base.in_features) != (outputs, inputs):
            wrong.append(module)
            continue
        layer = LoraLinear(base, lora, masks, number)
        model.set_submodule(name, layer)
        parameters |= {f"{module}.lora_A": layer.lora_A, f"{module}.lora_B": layer.lora_B}
    if wrong:
        raise BackendError(f"these modules cannot be adapted as the checkpoint's shapes say: {', '.join(wrong)}")
    return parameters


def _live_name(names: list[str], module: str) -> str:
    """The name in the live model of a module as the checkpoint names it; wrappers may have changed its beginning."""
    if module in names:
        return module
    shared = ending(module)
    matches = [name for name in names if name == shared or name.endswith(f".{shared}")]
    if len(matches) != 1:
        raise BackendError(f"{module} is in the checkpoint but not in the model that transformers makes of it")
    return matches[0]
