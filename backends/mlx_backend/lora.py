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
        self._seed, self._step, self._micro = seed, 0, 0

    def at(self, step: int, micro: int) -> None:
        self._step, self._micro = step, micro

    def key(self, module: int) -> mx.array:
        sequence = np.random.SeedSequence((self._seed, self._step, self._micro, module))
        key: mx.array = mx.random.key(int(sequence.generate_state(1, np.uint64)[0]))
        return key


class Dropout(nn.Module):  # type: ignore[misc]
    """Which entries of an adapter's input remain."""

    def __init__(self, rate: float, keys: DropoutKeys, module: int) -> None:
        super().__init__()
        self.keep, self._keys, self._module = 1.0 - rate, keys, module

    def mask(self, x: mx.array) -> mx.array | None:
        """bool, as x; None where every entry remains."""
        if not self.training or self.keep == 1.0:
            return None
        mask: mx.array = mx.random.bernoulli(self.keep, x.shape, key=self._keys.key(self._module))
        return mask


class AdaptedLinear(LoRALinear):  # type: ignore[misc]
    """W x + scale * B A dropout(x), with A [in, r] and B [r, out].

    The gradient has a formula of its own: the scale is applied to the low-rank products [.., r] and not to the wide
    ones, and nothing wide is kept but x.
    """

    def __call__(self, x: mx.array) -> mx.array:
        mask = self.dropout.mask(x)  # the mask is kept for the backward pass, not the masked input

        @mx.custom_function
        def product(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
            return self.forward(x, a, b, mask)

        @product.vjp
        def backward(inputs: Any, grad_outputs: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
            x, a, b = inputs
            return self.backward(x, a, b, mask, outputs[1], grad_outputs[0])

        outputs: Any = product(x, self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype))
        return outputs[0]  # type: ignore[no-any-return]

    def factor(self, mask: mx.array | None) -> float:
        """What the adapter's product is multiplied by; what dropout leaves of its input is divided by 1 - p."""
        return float(self.scale if mask is None else self.scale / self.dropout.keep)

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


def attach(
    model: nn.Module, modules: Mapping[str, tuple[int, int]], lora: LoraSpec, keys: DropoutKeys
) -> dict[str, AdaptedLinear]:
    """An adapter on each of `modules` -> (out, in). Raises BackendError for names that MLX's model lacks."""
    named = dict(model.named_modules())
    missing = [name for name in modules if not isinstance(named.get(name), nn.Linear | nn.QuantizedLinear)]
    if missing:
        raise BackendError(f"mlx-lm's model has no linear layers named {', '.join(missing)}")
    adapters: dict[str, AdaptedLinear] = {}
    for index, name in enumerate(modules):
        parent, _, leaf = name.rpartition(".")
        adapter = LoRALinear.from_base(named[name], r=lora.rank, scale=lora.scale)
        adapter.__class__ = AdaptedLinear
        adapter.dropout = Dropout(lora.dropout, keys, index)
        setattr(named[parent], leaf, adapter)
        adapters[name] = adapter
    return adapters


def _rows_of(x: mx.array) -> mx.array:
    """[.., D] -> [N, D]"""
    return x.reshape(-1, x.shape[-1])
