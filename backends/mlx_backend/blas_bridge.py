"""Products by numpy's BLAS, for float32 models in MLX on a Linux CPU: of linear layers, and of the delta rule.

MLX's wheels for Linux are linked with the reference BLAS, 10 to 25 times slower than numpy's. macOS has Accelerate and
a GPU its kernels: nothing here is used there. A product is computed when it is asked for, also while MLX traces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import FloatArray
from backends.mlx_backend.lora import AdaptedLinear, dense, dropped

ENABLED = sys.platform == "linux"  # tests set it to False, and so run what a Mac runs
_FEW_ROWS = 8  # below this, unpacking 4-bit weights costs more than it saves
_QUIET = np.errstate(all="ignore")  # the session itself looks for what is not finite


def serves(device: mx.Device, dtype: mx.Dtype, checkpointing: bool) -> bool:
    """Not with checkpointing: a product that is computed at once keeps what checkpointing would drop."""
    return ENABLED and device.type == mx.cpu and dtype == mx.float32 and not checkpointing


def connect(model: nn.Module, whole: bool = False) -> None:
    """Let the linear layers of this model, and of no other, compute with numpy. whole: their weights train."""
    bridged = _TRAINED if whole else _BRIDGED
    for module in model.modules():
        module.__class__ = bridged.get(type(module), type(module))


@_QUIET
def product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b in float32, of shapes [.., N, K] and [.., K, M]; not differentiable where numpy makes it."""
    if not ENABLED or mx.default_device() != mx.cpu:
        return a @ b
    return mx.array(np.asarray(a) @ np.asarray(b))


def _is_served(linear: nn.Module, x: mx.array) -> bool:
    """Not where scales of 8 bits make the weight, or x is bfloat16: BLAS does not know that type."""
    if not isinstance(linear, nn.QuantizedLinear):
        return bool(x.dtype == linear.weight.dtype == mx.float32)
    return bool(x.dtype == linear.scales.dtype == mx.float32 and x.size >= _FEW_ROWS * x.shape[-1])


def _weight(linear: nn.Module) -> FloatArray:
    """[out, in]; 4-bit weights are unpacked each time, so that no more than one layer's are held."""
    return np.asarray(dense(linear))


def _rows(x: mx.array) -> FloatArray:
    """[.., D] -> [N, D]"""
    return np.asarray(x).reshape(-1, x.shape[-1])


def _as_mlx(rows: FloatArray, shape: tuple[int, ...]) -> mx.array:  # [N, M] -> [.., M], of a shape [.., D]
    return mx.array(rows.reshape(*shape[:-1], rows.shape[-1]))


def _linear(linear: nn.Module, x: mx.array, plain: Callable[[mx.array], mx.array]) -> mx.array:
    """x [.., in] times the frozen weight [out, in] and its bias, differentiable by x; `plain` is MLX's own product."""
    if not _is_served(linear, x):
        return plain(x)

    @mx.custom_function
    @_QUIET
    def product(x: mx.array) -> mx.array:
        return _as_mlx(_rows(x) @ _weight(linear).T, x.shape)

    @product.vjp
    @_QUIET
    def backward(_x: mx.array, grad_output: mx.array, _output: mx.array) -> mx.array:
        return _as_mlx(_rows(grad_output) @ _weight(linear), grad_output.shape)

    y: Any = product(x)
    return y + linear.bias if "bias" in linear else y  # type: ignore[no-any-return]


def _trained(linear: nn.Module, x: mx.array, plain: Callable[[mx.array], mx.array]) -> mx.array:
    """The same, differentiable by the weight too."""
    if not _is_served(linear, x):
        return plain(x)

    @mx.custom_function
    @_QUIET
    def product(x: mx.array, weight: mx.array) -> mx.array:
        return _as_mlx(_rows(x) @ np.asarray(weight).T, x.shape)

    @product.vjp
    @_QUIET
    def backward(inputs: Any, grad_output: mx.array, _output: mx.array) -> tuple[mx.array, mx.array]:
        (x, weight), grad = inputs, _rows(grad_output)
        return _as_mlx(grad @ np.asarray(weight), grad_output.shape), mx.array(grad.T @ _rows(x))

    y: Any = product(x, linear.weight)
    return y + linear.bias if "bias" in linear else y  # type: ignore[no-any-return]


def _bridged(kind: type[Any], method: str, product: Callable[..., mx.array] = _linear) -> type[Any]:
    """A layer like `kind`, whose product is its `method`."""

    def call(self: Any, x: mx.array) -> mx.array:
        return product(self, x, partial(getattr(kind, method), self))

    return type(kind.__name__, (kind,), {method: call})


class _AdaptedLinear(AdaptedLinear):
    @_QUIET
    def forward(self, x: mx.array, a: mx.array, b: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array]:
        if not _is_served(self.linear, x):
            return super().forward(x, a, b, mask)
        low_rank = self.factor(mask) * (_rows(dropped(x, mask)) @ np.asarray(a))
        y = _rows(x) @ _weight(self.linear).T
        y += low_rank @ np.asarray(b)
        y += np.asarray(self.linear.get("bias", 0.0))
        return _as_mlx(y, x.shape), mx.array(low_rank)

    @_QUIET
    def backward(
        self, x: mx.array, a: mx.array, b: mx.array, mask: mx.array | None, low_rank: mx.array, grad_output: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        if not _is_served(self.linear, x):
            return super().backward(x, a, b, mask, low_rank, grad_output)
        grad = _rows(grad_output)
        grad_low_rank = self.factor(mask) * (grad @ np.asarray(b).T)
        grad_input = grad @ _weight(self.linear)
        grad_dropped = grad_low_rank @ np.asarray(a).T
        grad_input += grad_dropped if mask is None else _rows(mask) * grad_dropped
        grad_a, grad_b = _rows(dropped(x, mask)).T @ grad_low_rank, _rows(low_rank).T @ grad
        return _as_mlx(grad_input, x.shape), mx.array(grad_a), mx.array(grad_b)


_BRIDGED: dict[type, type[Any]] = {
    nn.Linear: _bridged(nn.Linear, "__call__"),
    nn.QuantizedLinear: _bridged(nn.QuantizedLinear, "__call__"),
    nn.Embedding: _bridged(nn.Embedding, "as_linear"),
    AdaptedLinear: _AdaptedLinear,
}
_TRAINED: dict[type, type[Any]] = {
    nn.Linear: _bridged(nn.Linear, "__call__", _trained),
    nn.Embedding: _bridged(nn.Embedding, "as_linear", _trained),
}
