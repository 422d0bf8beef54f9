"""Adapters in MLX: linear layers whose gradient is computed for A, B and the input alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from backends import dropout
from backends.interface import BackendError, FloatArray, LoraSpec, Modules
from backends.layer_names import Names, Part


class Dropout:
    """The masks of `backends.dropout` for the adapters' inputs; off outside a step."""

    def __init__(self, probability: float, seed: int, modules: Modules) -> None:
        self.keep = dropout.kept_share(probability)
        self._limit, self._seed, self._names = dropout.limit(probability), seed, list(modules)
        self._modules = mx.array(dropout.module_words(modules))[:, None] if probability else None  # [M, 1]
        self._keys: mx.array | None = None  # [M, N] of the tokens that are run now; None: not training

    def at(self, step: int, where: dropout.Places) -> None:
        """From here on the tokens at these places are run, in a step that comes after `step` others."""
        if self._modules is not None:
            self._keys = dropout.mixed(self._modules ^ mx.array(dropout.token_words(self._seed, step, where)))

    def off(self) -> None:
        self._keys = None

    @property
    def keys(self) -> mx.array | None:
        """Those of the tokens that are run now, for `as_of`."""
        return self._keys

    @contextmanager
    def as_of(self, keys: mx.array | None) -> Iterator[None]:
        """In here the tokens are run again that `keys` was taken for."""
        before, self._keys = self._keys, keys
        try:
            yield
        finally:
            self._keys = before

    def mask(self, module: int, x: mx.array) -> mx.array | None:
        """True where an input of x [.., in] is kept; None: all are. Raises BackendError unless x has N inputs."""
        if self._keys is None:
            return None
        tokens, width = self._keys.shape[1], x.shape[-1]
        if x.size != tokens * width:
            raise BackendError(
                f"{self._names[module]} is run on {x.size // width} inputs for {tokens} tokens, so dropout does not "
                "know which is whose; set lora.dropout: 0, or leave the layer out of lora.targets"
            )
        words = dropout.mixed(self._keys[module][:, None] ^ mx.array(dropout.feature_words(width)))  # [N, in / 2]
        mask: mx.array = words.view(mx.int16)[:, :width] < self._limit
        return mask.reshape(x.shape)


class AdaptedLinear(LoRALinear):  # type: ignore[misc]
    """W x + scale * B A dropout(x), with A [in, r] and B [r, out].

    The gradient has a formula of its own: the scale is applied to the low-rank products [.., r] and not to the wide
    ones, and nothing wide is kept but x. With DoRA all but the bias is multiplied by m / |W + scale * B A| [out],
    whose lengths count as constants; MLX's tape then keeps the product too.
    """

    def __call__(self, x: mx.array) -> mx.array:
        mask = self.masks.mask(self.number, x)  # the mask is kept for the backward pass, not the masked input

        @mx.custom_function
        def product(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
            return self.forward(x, a, b, mask)

        @product.vjp
        def backward(inputs: Any, grad_outputs: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
            x, a, b = inputs
            return self.backward(x, a, b, mask, outputs[1], grad_outputs[0])

        outputs: Any = product(x, self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype))
        product_of_all: mx.array = outputs[0]
        return product_of_all if "gate" not in self else self._scaled(product_of_all)

    def measure(self) -> mx.array:
        """The lengths of W's rows [out], kept for `put_magnitude`."""
        self._lengths = mx.linalg.norm(dense(self.linear).astype(mx.float32), axis=1)  # "_": no parameter of MLX's
        mx.eval(self._lengths)
        lengths: mx.array = self._lengths
        return lengths

    def put_magnitude(self, magnitude: mx.array) -> None:
        """m [out], for the A and B that are in the layer now."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.scale * self.lora_b)
        crossed = 2 * (dense(self.linear).astype(mx.float32) @ a) + b.T @ (a.T @ a)  # [out, r]
        squared = mx.square(self._lengths) + (crossed * b.T).sum(1)  # |W|^2 + 2 scale W A^T . B + ...
        self.gate = magnitude / mx.sqrt(mx.maximum(squared, 0))

    def _scaled(self, y: mx.array) -> mx.array:
        gate = self.gate.astype(y.dtype)
        return y * gate if "bias" not in self.linear else (y - self.linear.bias) * gate + self.linear.bias

    def factor(self, mask: mx.array | None) -> float:
        """What the adapter's product is multiplied by; what dropout leaves of its input is divided by 1 - p."""
        return float(self.scale if mask is None else self.scale / self.masks.keep)

    def forward(self, x: mx.array, a: mx.array, b: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array]:
        """y [.., out] and the low-rank product [.., r] that the backward pass needs."""
        low_rank = self.factor(mask) * (dropped(x, mask) @ a)
        return mx.addmm(self.linear(x), low_rank, b), low_rank

    def backward(
        self, x: mx.array, a: mx.array, b: mx.array, mask: mx.array | None, low_rank: mx.array, grad_output: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients by x, A and B from that by y [.., out]."""
        grad_low_rank = self.factor(mask) * (grad_output @ b.T)  # [.., r]
        grad_a = _rows_of(dropped(x, mask)).T @ _rows_of(grad_low_rank)
        grad_b = _rows_of(low_rank).T @ _rows_of(grad_output)
        grad_input = _frozen_grad(self.linear, grad_output)
        if mask is None:
            return mx.addmm(grad_input, grad_low_rank, a.T), grad_a, grad_b
        return grad_input + mask * (grad_low_rank @ a.T), grad_a, grad_b


def dropped(x: mx.array, mask: mx.array | None) -> mx.array:
    """What the adapter sees of x."""
    return x if mask is None else x * mask


def _frozen_grad(linear: nn.Linear | nn.QuantizedLinear, grad_output: mx.array) -> mx.array:
    """The gradient [.., in] by the input of a frozen layer alone."""
    if not isinstance(linear, nn.QuantizedLinear):
        return mx.matmul(grad_output, linear.weight)
    packing = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    weight = (linear.weight, linear.scales, linear.get("biases"))
    grad_input: mx.array = mx.quantized_matmul(grad_output, *weight, transpose=False, **packing)
    return grad_input


class Attached(NamedTuple):
    """The layers that hold one adapter: one, or several that each give some rows of the output."""

    layers: tuple[AdaptedLinear, ...]
    rows: tuple[slice, ...]

    def put(self, a: mx.array, b: mx.array, magnitude: mx.array | None = None) -> None:
        """A [in, r], B [r, out] and DoRA's m [out] of the whole layer."""
        for layer, rows in zip(self.layers, self.rows, strict=True):
            layer.lora_a, layer.lora_b = a, b if len(self.layers) == 1 else b[:, rows]
            if magnitude is not None:
                layer.put_magnitude(magnitude if len(self.layers) == 1 else magnitude[rows])


def attach(model: nn.Module, names: Names, lora: LoraSpec, masks: Dropout) -> dict[str, Attached]:
    """An adapter on each layer of `names`. Raises BackendError for names that MLX's model lacks."""
    named = dict(model.named_modules())
    live = [part.name for parts in names.values() for part in parts]
    missing = [name for name in live if not isinstance(named.get(name), nn.Linear | nn.QuantizedLinear)]
    if missing:
        raise BackendError(f"mlx-lm's model has no linear layers named {', '.join(missing)}")
    attached: dict[str, Attached] = {}
    for number, (module, parts) in enumerate(names.items()):
        layers = tuple(_adapted(named, part.name, lora, masks, number) for part in parts)
        attached[module] = Attached(layers, tuple(slice(part.first, part.last) for part in parts))
    return attached


def _adapted(named: Mapping[str, nn.Module], name: str, lora: LoraSpec, masks: Dropout, number: int) -> AdaptedLinear:
    parent, _, leaf = name.rpartition(".")
    adapter: Any = LoRALinear.from_base(named[name], r=lora.rank, scale=lora.scale)
    adapter.__class__ = AdaptedLinear
    adapter.masks, adapter.number = masks, number
    setattr(named[parent], leaf, adapter)
    return adapter  # type: ignore[no-any-return]


def dense(layer: nn.Module) -> mx.array:
    """The frozen weight of a layer [out, in], dequantised."""
    weight: mx.array = layer.weight
    if "scales" in layer:
        packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        weight = mx.dequantize(weight, layer.scales, layer.get("biases"), **packing)
    return weight


def base_weight(model: nn.Module, parts: tuple[Part, ...]) -> FloatArray:
    """`Session.base_weight`: of a layer that MLX's model has in these parts."""
    named, pieces = dict(model.named_modules()), []
    for part in parts:
        layer = named.get(part.name)
        layer = getattr(layer, "linear", layer)
        if layer is None or "weight" not in layer:
            raise BackendError(f"mlx-lm's model has no layer named {part.name}")
        pieces.append(np.array(dense(layer).astype(mx.float32)))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _rows_of(x: mx.array) -> mx.array:
    """[.., D] -> [N, D]"""
    return x.reshape(-1, x.shape[-1])
