"""LoRA layers for torch: the frozen weight gets no gradient, and what is scaled and saved is the low-rank product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from backends import dropout
from backends.interface import BackendError, FloatArray, LoraSpec, Modules
from backends.text_blocks import ending
from backends.torch_backend.device import uploaded
from backends.torch_backend.four_bit import dense
from backends.torch_backend.products import Adapted, Call, Draw, Gated, source_of

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
            words = dropout.token_words(self._seed, step, where).view(np.int32)
            self._keys = _mixed(self._modules ^ uploaded([words], self._modules.device)[0])

    def off(self) -> None:
        self._keys = None

    @property
    def keys(self) -> torch.Tensor | None:
        """Those of the tokens that are run now, for `as_of`."""
        return self._keys

    @contextmanager
    def as_of(self, keys: torch.Tensor | None) -> Iterator[None]:
        """In here the tokens are run again that `keys` was taken for."""
        before, self._keys = self._keys, keys
        try:
            yield
        finally:
            self._keys = before

    def mask(self, module: int, x: torch.Tensor) -> Draw | None:
        """What draws a mask [N, in], True where an input of x [..., in] is kept, as often as needed; None: all are.

        Raises BackendError where N is another.
        """
        if self._keys is None:
            return None
        tokens, width = x.shape[:-1].numel(), x.shape[-1]
        keys = self._keys[module]
        if tokens != len(keys):
            raise BackendError(
                f"{self._names[module]} is run on {tokens} inputs for {len(keys)} tokens, so dropout does not know "
                "which is whose; set lora.dropout: 0, or leave the layer out of lora.targets"
            )
        return partial(self._drawn, keys, width)

    def _drawn(self, keys: torch.Tensor, width: int) -> torch.Tensor:
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
        self.unused = False  # True: nobody needs the output, only what the gradient needs is to be made
        self._cast: Any = None  # A and B in another type, and the type and the versions that they are of

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Adapted.apply(x, self.lora_A, self.lora_B, self._call(x), source_of(x))
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The same with x = silu(gate) * up, which is not saved. [..., in] -> [..., out]"""
        out: torch.Tensor = Gated.apply(gate, up, self.lora_A, self.lora_B, self._call(gate))
        return out

    def _call(self, x: torch.Tensor) -> Call:
        draw = self._masks.mask(self._number, x)
        scale = self._scale / (1.0 if draw is None else self._masks.keep)
        return Call(self.base, scale, draw, self.unused, *self._factors(x.dtype))

    def _factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in this type: cast once after each change, and not in each pass."""
        a, b = self.lora_A, self.lora_B
        if a.dtype == dtype:
            return a.detach(), b.detach()
        now = (dtype, a._version, b._version)
        if self._cast is None or self._cast[0] != now:
            with torch.inference_mode(False), torch.no_grad():  # a later step may need them for its gradient
                self._cast = now, (a.to(dtype), b.to(dtype))
        factors: tuple[torch.Tensor, torch.Tensor] = self._cast[1]
        return factors


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
