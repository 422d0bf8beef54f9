"""float32 matrix products of an MLX model on a CPU without Accelerate, by numpy's BLAS.

MLX's wheels for Linux are linked with the reference BLAS, which is 10 to 25 times slower (measured:
2 GFLOP in 250 ms). On a GPU, and on macOS, where MLX computes with Accelerate, none of this is used.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

_FEW_ROWS = 8  # below this, unpacking 4-bit weights costs more than it saves


def use_blas(model: nn.Module) -> None:
    """Change this model's layers, and no others, to compute with numpy's BLAS where MLX's own is slow."""
    if sys.platform == "darwin":
        return
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]


def _blas(left: mx.array, right: mx.array) -> mx.array:
    """[..., K] @ [K, N]"""
    rows = np.asarray(left).reshape(-1, left.shape[-1])
    with np.errstate(all="ignore"):  # the session looks for what is not finite itself
        return mx.array(rows @ np.asarray(right)).reshape(*left.shape[:-1], right.shape[-1])


def _frozen(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., in] @ weight [in, out], differentiable in x alone."""
    if not x.dtype == weight.dtype == mx.float32:
        return x @ weight

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _blas(x, weight)

    @product.vjp
    def backward(_x: mx.array, slope: mx.array, _product: mx.array) -> mx.array:
        return _blas(slope, weight.T)

    return product(x)  # type: ignore[return-value]


@mx.custom_function
def _trained(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., in] @ weight [in, out], differentiable in both."""
    return _blas(x, weight)


@_trained.vjp
def _trained_backward(
    inputs: tuple[mx.array, mx.array], slope: mx.array, _product: mx.array
) -> tuple[mx.array, mx.array]:
    x, weight = inputs
    rows = x.reshape(-1, x.shape[-1])
    return _blas(slope, weight.T), _blas(rows.T, slope.reshape(rows.shape[0], -1))


class _Linear(nn.Linear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        y = _frozen(x, self.weight.T)
        return y + self.bias if "bias" in self else y


class _QuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array
        if x.dtype != mx.float32 or x.size < _FEW_ROWS * x.shape[-1]:
            y = super().__call__(x)
            return y
        packing = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        y = _frozen(x, mx.dequantize(self.weight, self.scales, self.get("biases"), **packing).T)
        return y + self.bias if "bias" in self else y


class _Embedding(nn.Embedding):  # type: ignore[misc]
    def as_linear(self, x: mx.array) -> mx.array:
        return _frozen(x, self.weight.T)


class _LoRALinear(LoRALinear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x) if x.dtype != mx.float32 else self._product(x)
        return y

    def _product(self, x: mx.array) -> Any:
        return self.linear(x) + self.scale * _trained(_trained(self.dropout(x), self.lora_a), self.lora_b)


_FAST: dict[type, type[Any]] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    LoRALinear: _LoRALinear,
}
