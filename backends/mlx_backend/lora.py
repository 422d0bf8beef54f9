"""Adapters in MLX: linear layers whose gradient is computed for A, B and the input alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from backends.interface import BackendError, LoraSpec


class DropoutKeys:
    """Random keys that are a function of seed, step, micro-batch and module alone.

    A checkpointed block draws the same mask again when it is recomputed, which a global random state would not give.
    """

    def __init__(self, seed: int) -> None:
        self._place = (seed, 0, 0)

    def at(self, step: int, micro: int) -> None:
        self._place = (self._place[0], step, micro)

    def key(self, module: int) -> mx.array:
        seed = np.random.SeedSequence((*self._place, module)).generate_state(1, np.uint64)[0]
        key: mx.array = mx.random.key(int(seed))
        return key


class Dropout(nn.Module):  # type: ignore[misc]
    """Which entries of an adapter's input are kept."""

    def __init__(self, rate: float, keys: DropoutKeys, module: int) -> None:
        super().__init__()
        self.keep, self._keys, self._module = 1.0 - rate, keys, module

    def mask(self, x: mx.array) -> mx.array | None:
        """bool, as x; None where all are kept."""
        if not self.training or self.keep == 1.0:
            return None
        kept: mx.array = mx.random.bernoulli(self.keep, x.shape, key=self._keys.key(self._module))
        return kept


class AdaptedLinear(LoRALinear):  # type: ignore[misc]
    """W x + scale * B A dropout(x), with A [in, r] and B [r, out].

    The gradient has a formula of its own: the scale is applied to the small products [.., r] and not to the wide
    ones, and nothing wide is kept but x.
    """

    def __call__(self, x: mx.array) -> mx.array:
        kept = self.dropout.mask(x)  # the mask is kept for the backward pass, not the masked input

        @mx.custom_function
        def product(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
            return self.forward(x, a, b, kept)

        @product.vjp
        def backward(inputs: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
            x, a, b = inputs
            return self.backward(x, a, b, kept, outputs[1], slopes[0])

        found: Any = product(x, self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype))
        return found[0]  # type: ignore[no-any-return]

    def factor(self, kept: mx.array | None) -> float:
        """What the adapter's product is multiplied by; what dropout keeps of its input is divided by 1 - p."""
        return float(self.scale if kept is None else self.scale / self.dropout.keep)

    def forward(self, x: mx.array, a: mx.array, b: mx.array, kept: mx.array | None) -> tuple[mx.array, mx.array]:
        """y [.., out] and the small product [.., r] that the backward pass needs."""
        small = self.factor(kept) * ((x if kept is None else x * kept) @ a)
        return mx.addmm(self.linear(x), small, b), small

    def backward(
        self, x: mx.array, a: mx.array, b: mx.array, kept: mx.array | None, small: mx.array, slope: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The slopes of x, A and B from that of y [.., out]."""
        thin = self.factor(kept) * (slope @ b.T)  # [.., r]
        seen = x if kept is None else x * kept
        slope_a = _rows(seen).T @ _rows(thin)
        slope_b = _rows(small).T @ _rows(slope)
        below = input_slope(self.linear, slope)
        below = mx.addmm(below, thin, a.T) if kept is None else below + kept * (thin @ a.T)
        return below, slope_a, slope_b


def input_slope(linear: nn.Linear | nn.QuantizedLinear, slope: mx.array) -> mx.array:
    """The slope [.., in] of a frozen layer's input."""
    below: mx.array
    if isinstance(linear, nn.QuantizedLinear):
        packing = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        weight = (linear.weight, linear.scales, linear.get("biases"))
        below = mx.quantized_matmul(slope, *weight, transpose=False, **packing)
    else:
        below = slope @ linear.weight
    return below


def attach(
    model: nn.Module, modules: Mapping[str, tuple[int, int]], lora: LoraSpec, keys: DropoutKeys
) -> dict[str, AdaptedLinear]:
    """An adapter on each of `modules` -> (out, in). Raises BackendError for names that MLX's model lacks."""
    there = dict(model.named_modules())
    missing = [name for name in modules if not isinstance(there.get(name), nn.Linear | nn.QuantizedLinear)]
    if missing:
        raise BackendError(f"mlx-lm's model has no linear layers named {', '.join(missing)}")
    adapters: dict[str, AdaptedLinear] = {}
    for index, name in enumerate(modules):
        parent, _, leaf = name.rpartition(".")
        adapter = LoRALinear.from_base(there[name], r=lora.rank, scale=lora.scale)
        adapter.__class__ = AdaptedLinear
        adapter.dropout = Dropout(lora.dropout, keys, index)
        setattr(there[parent], leaf, adapter)
        adapters[name] = adapter
    return adapters


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
