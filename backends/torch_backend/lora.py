"""LoRA and DoRA in torch: no gradients for frozen weights, and only the low-rank product is saved and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from backends.interface import MAGNITUDE, BackendError, FloatArray, LoraSpec, Modules
from backends.text_blocks import ending
from backends.torch_backend.four_bit import dense, unpack_together
from backends.torch_backend.gated import Activation
from backends.torch_backend.masks import Dropout
from backends.torch_backend.products import Adapted, Call, Gated, Shared, source_of

Parameters = dict[str, torch.nn.Parameter]


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """W x + b + scale * B A dropout(x); W may be 4-bit. A [r, in] and B [out, r] are float32 and act in x's type.

    With DoRA all but b is multiplied by m / |W + scale * B A| [out], whose lengths count as constants.
    """

    def __init__(self, base: torch.nn.Linear, lora: LoraSpec, masks: Dropout, number: int) -> None:
        super().__init__()
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.base, self._scale = base, lora.scale
        self.lora_A = torch.nn.Parameter(torch.zeros(lora.rank, base.in_features, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, lora.rank, **like))
        self._lengths: Any = None  # of W's rows [out], with DoRA
        self.magnitude: torch.nn.Parameter | None = None  # [out]
        self._now: Any = None  # the lengths of the adapted rows, and the versions of A and B that they are of
        if lora.dora:
            self._lengths = _lengths(base)
            self.magnitude = torch.nn.Parameter(self._lengths.clone())
        self._masks, self._number = masks, number
        self.unused = False  # True: nobody needs the output, only what the gradient needs is to be made
        self.siblings = Siblings([self])

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(self.siblings.output(self, x))

    def gated(self, activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The same with x = activation(gate) * up, which is not saved. [..., in] -> [..., out]"""
        return self._scaled(Gated.apply(gate, up, activation, self.siblings.called(gate), self.lora_A, self.lora_B))

    def _scaled(self, out: torch.Tensor) -> torch.Tensor:
        if self.magnitude is None:
            return out
        gate = (self.magnitude / self._adapted_lengths()).to(out.dtype)
        return out * gate if self.bias is None else (out - self.bias) * gate + self.bias

    def _adapted_lengths(self) -> torch.Tensor:
        """|W + scale * B A|, by what is already known: |W|^2 + 2 scale (W A^T) . B + scale^2 (B A A^T) . B [out]"""
        now = self.lora_A._version, self.lora_B._version
        if self._now is None or self._now[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                a, b = self.lora_A.detach(), self._scale * self.lora_B.detach()
                crossed = 2 * dense(self.base, torch.float32).float() @ a.T + b @ (a @ a.T)  # [out, r]
                self._now = now, (self._lengths.square() + (crossed * b).sum(1)).clamp_(min=0).sqrt_()
        lengths: torch.Tensor = self._now[1]
        return lengths

    def call(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Call:
        """One use, with A and B in the type of x."""
        mask = self._masks.mask(self._number, x)
        scale = self._scale / (1.0 if mask is None else self._masks.keep)
        return Call(self.base, scale, mask, self.unused and self.magnitude is None, a, b)


class Siblings:
    """Layers of the same input, as queries, keys and values are: the first that is called computes all of them.

    That is one low-rank product instead of several, and much less for a GPU's host to do.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self._layers = tuple(layers)
        self._parameters = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
        self._x: torch.Tensor | None = None  # that of the outputs which wait
        self._waiting: dict[LoraLinear, torch.Tensor] = {}
        self._cast: Any = None  # the factors in another type, and the type and the versions that they are of

    @property
    def bases(self) -> list[torch.nn.Linear]:
        return [layer.base for layer in self._layers]

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        if self._x is not x or layer not in self._waiting:
            outs = Adapted.apply(x, self.called(x), source_of(x), *self._parameters)
            self._x, self._waiting = x, dict(zip(self._layers, outs, strict=True))
        out = self._waiting.pop(layer)
        if not self._waiting:
            self._x = None
        return out

    def called(self, x: torch.Tensor) -> Shared:
        whole, a, b = self.factors(x.dtype)
        parts = zip(self._layers, a, b, strict=True)
        return Shared(tuple(layer.call(x, *factors) for layer, *factors in parts), whole)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, Sequence[torch.Tensor], list[torch.Tensor]]:
        """A of all layers, one below the other, and each one's A and B: made once after each change of them."""
        now = (dtype, *(factor._version for factor in self._parameters))
        if self._cast is None or self._cast[0] != now:
            with torch.inference_mode(False), torch.no_grad():  # a later step may need them for its gradient
                a, b = ([factor.detach() for factor in self._parameters[start::2]] for start in (0, 1))
                whole = (torch.cat(a) if len(a) > 1 else a[0]).to(dtype)
                self._cast = now, (whole, whole.chunk(len(a)), [factor.to(dtype) for factor in b])
        factors: tuple[torch.Tensor, Sequence[torch.Tensor], list[torch.Tensor]] = self._cast[1]
        return factors


def join_siblings(model: Any) -> None:
    """Adapted layers that a module of the model calls with the same input."""
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers = [getattr(module, name, None) for name in names]
            known = [layer for layer in layers if isinstance(layer, LoraLinear)]
            unread = getattr(module, "is_kv_shared_layer", False)  # such a block reads another one's keys and values
            if len(known) == len(names) and len({layer.base.in_features for layer in known}) == 1 and not unread:
                siblings = Siblings(known)
                for layer in known:
                    layer.siblings = siblings


def join_weights(model: Any) -> None:
    """4-bit weights of adapted layers of one input are unpacked together from here on, where they can be."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for siblings in {id(layer.siblings): layer.siblings for layer in layers}.values():
        unpack_together(siblings.bases)


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
        if layer.magnitude is not None:
            parameters[f"{module}.{MAGNITUDE}"] = layer.magnitude
    if wrong:
        raise BackendError(f"these modules cannot be adapted as the checkpoint's shapes say: {', '.join(wrong)}")
    join_siblings(model)
    return parameters


def _lengths(layer: torch.nn.Linear) -> torch.Tensor:
    """Of the frozen weight's rows, float32 [out]."""
    lengths: torch.Tensor = torch.linalg.vector_norm(dense(layer, torch.float32).float(), dim=1)
    return lengths


def _live_name(names: list[str], module: str) -> str:
    """The name in the live model of a module as the checkpoint names it; wrappers may have changed its beginning."""
    if module in names:
        return module
    shared = ending(module)
    matches = [name for name in names if name == shared or name.endswith(f".{shared}")]
    if len(matches) != 1:
        raise BackendError(f"{module} is in the checkpoint but not in the model that transformers makes of it")
    return matches[0]
