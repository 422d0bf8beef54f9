"""Products of linear layers by numpy's BLAS, for float32 models in MLX on a Linux CPU.

MLX's wheels for Linux are linked with the reference BLAS, 10 to 25 times slower than numpy's (measured: 2 GFLOP in
250 ms). macOS has Accelerate and a GPU its kernels, so nothing here is used there. A product is computed where the
model asks for it, also while MLX traces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import FloatArray
from backends.mlx_backend.lora import AdaptedLinear

ENABLED = sys.platform == "linux"  # tests set it to False, and so run what a Mac runs
_FEW_ROWS = 8  # below this, unpacking 4-bit weights costs more than it saves


def serves(device: mx.Device, dtype: mx.Dtype, checkpointing: bool) -> bool:
    """Whether a model's products go over the bridge.

    Not with checkpointing: a product that is computed at once keeps what checkpointing would drop.
    """
    return ENABLED and device.type == mx.cpu and dtype == mx.float32 and not checkpointing


def connect(model: nn.Module) -> None:
    """Let the linear layers of this model, and of no other, compute with numpy."""
    for module in model.modules():
        if type(module) in _BRIDGED:
            module.__class__ = _BRIDGED[type(module)]


def _matmul(left: mx.array, right: FloatArray) -> mx.array:
    """[.., K] @ [K, M]"""
    rows = np.asarray(left).reshape(-1, left.shape[-1])
    with np.errstate(all="ignore"):  # the session itself looks for what is not finite
        return mx.array((rows @ right).reshape(*left.shape[:-1], right.shape[-1]))


def _weight(linear: nn.Module) -> FloatArray:
    """[out, in]; 4-bit weights are unpacked each time, so that no more than one layer's are held."""
    if not isinstance(linear, nn.QuantizedLinear):
        return np.asarray(linear.weight)
    packing = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return np.asarray(mx.dequantize(linear.weight, linear.scales, linear.get("biases"), **packing))


def _is_served(linear: nn.Module, x: mx.array) -> bool:
    """Not where scales of 8 bits make the weight, or x is bfloat16: BLAS does not know that type."""
    if not isinstance(linear, nn.QuantizedLinear):
        return bool(x.dtype == linear.weight.dtype == mx.float32)
    return bool(x.dtype == linear.scales.dtype == mx.float32 and x.size >= _FEW_ROWS * x.shape[-1])


def _bridged(linear: nn.Module, x: mx.array, plain: Callable[[mx.array], mx.array]) -> mx.array:
    """x [.., in] times the frozen weight [out, in] and its bias, differentiable by x; `plain` is MLX's own product."""
    if not _is_served(linear, x):
        return plain(x)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _matmul(x, _weight(linear).T)

    @product.vjp
    def backward(_x: mx.array, grad_output: mx.array, _output: mx.array) -> mx.array:
        return _matmul(grad_output, _weight(linear))

    y: Any = product(x)
    return y + linear.bias if "bias" in linear else y  # type: ignore[no-any-return]


class _Linear(nn.Linear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        return _bridged(self, x, super().__call__)


class _QuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        return _bridged(self, x, super().__call__)


class _Embedding(nn.Embedding):  # type: ignore[misc]
    def as_linear(self, x: mx.array) -> mx.array:
        return _bridged(self, x, super().as_linear)


class _AdaptedLinear(AdaptedLinear):
    @staticmethod
    def matmul(left: mx.array, right: mx.array) -> mx.array:
        if not left.dtype == right.dtype == mx.float32:
            return left @ right
        return _matmul(left, np.asarray(right))

    @staticmethod
    def addmm(added: mx.array, left: mx.array, right: mx.array) -> mx.array:
        return added + _AdaptedLinear.matmul(left, right)

    def frozen_grad(self, grad_output: mx.array) -> mx.array:
        if not _is_served(self.linear, grad_output):
            return super().frozen_grad(grad_output)
        return _matmul(grad_output, _weight(self.linear))


_BRIDGED: dict[type, type[Any]] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    AdaptedLinear: _AdaptedLinear,
}
