"""float32 arithmetic of an MLX model on a CPU without Accelerate, by numpy and its BLAS.

MLX's wheels for Linux are linked with the reference BLAS, which is 10 to 25 times slower (measured: 2 GFLOP in
250 ms), and their exponential is 15 times slower than numpy's. On a GPU, and on macOS, where MLX computes with
Accelerate, none of this is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations, rope_utils

from backends.interface import FloatArray
from backends.mlx_backend.cpu_kernels import room, rows_of, swiglu
from backends.mlx_backend.cpu_modules import RMSNorm, apart_from_the_trace, rotary
from backends.mlx_backend.lora import AdaptedLinear
from backends.mlx_backend.patch import rebound

_quiet = np.errstate(all="ignore")  # the session looks for what is not finite itself
_FEW_ROWS = 8  # below this, unpacking 4-bit weights costs more than it saves


def use_blas(model: nn.Module) -> bool:
    """Change this model's layers, and no others, to compute with numpy's BLAS where MLX's own is slow.

    What they compute is then evaluated at once.
    """
    if sys.platform == "darwin":
        return False
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
    rebound(model, "swiglu", activations.swiglu, swiglu)
    return True


@_quiet
def _product(left: FloatArray, right: FloatArray, shape: tuple[int, ...]) -> tuple[mx.array, FloatArray]:
    """[N, K] @ [K, M] as MLX has it, [.., M], and numpy's view [N, M] of it."""
    array, view = room((*shape[:-1], right.shape[-1]))
    view = view.reshape(-1, right.shape[-1])
    np.matmul(left, right, out=view)
    return array, view


def _weight(linear: nn.Module) -> FloatArray:
    """[out, in]; 4-bit weights are unpacked each time, so that no more than one layer's are held."""
    if not isinstance(linear, nn.QuantizedLinear):
        return np.asarray(linear.weight)
    packing = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return np.asarray(mx.dequantize(linear.weight, linear.scales, linear.get("biases"), **packing))


def _suits(linear: nn.Module, x: mx.array) -> bool:
    """Whether numpy is to compute this product; its BLAS knows no bfloat16."""
    few = isinstance(linear, nn.QuantizedLinear) and x.size < _FEW_ROWS * x.shape[-1]
    weight = linear.scales if isinstance(linear, nn.QuantizedLinear) else linear.weight
    return bool(x.dtype == weight.dtype == mx.float32 and not few)


def _frozen(linear: nn.Module, x: mx.array) -> mx.array:
    """x [.., in] times the weight [out, in], differentiable in x alone."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _product(rows_of(x), _weight(linear).T, x.shape)[0]

    @product.vjp
    def backward(_x: mx.array, slope: mx.array, _product_of_it: mx.array) -> mx.array:
        return _product(rows_of(slope), _weight(linear), slope.shape)[0]

    y: Any = product(x)
    return y  # type: ignore[no-any-return]


class _ByNumpy(nn.Module):  # type: ignore[misc]
    """Before a linear layer's own class: numpy's product where it suits."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _suits(self, x):
            plain: mx.array = super().__call__(x)
            return plain
        y = _frozen(self, x)
        return y + self.bias if "bias" in self else y


class _Linear(_ByNumpy, nn.Linear):  # type: ignore[misc]
    pass


class _QuantizedLinear(_ByNumpy, nn.QuantizedLinear):  # type: ignore[misc]
    pass


class _Embedding(nn.Embedding):  # type: ignore[misc]
    def as_linear(self, x: mx.array) -> mx.array:
        if not _suits(self, x):
            plain: mx.array = super().as_linear(x)
            return plain
        return _frozen(self, x)


class _AdaptedLinear(AdaptedLinear):
    first = False  # given what no adapter has touched: nobody asks for the slope of that

    def __call__(self, x: mx.array) -> mx.array:
        if (given := self.__dict__.get("given")) is not None:
            given.append((self, x))
        return super().__call__(x)

    @_quiet
    def forward(self, x: mx.array, a: mx.array, b: mx.array, kept: mx.array | None) -> tuple[mx.array, mx.array]:
        if not _suits(self.linear, x):
            return super().forward(x, a, b, kept)
        small = self.factor(kept) * (_seen(x, kept) @ np.asarray(a))
        y, rows = _product(rows_of(x), _weight(self.linear).T, x.shape)
        rows += small @ np.asarray(b)
        if "bias" in self.linear:
            rows += np.asarray(self.linear.bias)
        return y, mx.array(small)

    @_quiet
    def backward(
        self, x: mx.array, a: mx.array, b: mx.array, kept: mx.array | None, small: mx.array, slope: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        if not _suits(self.linear, x):
            return super().backward(x, a, b, kept, small, slope)
        given = rows_of(slope)
        thin = self.factor(kept) * (given @ np.asarray(b).T)
        below = mx.zeros_like(x) if self.first else self._below(given, thin, a, kept, slope.shape)
        return below, mx.array(_seen(x, kept).T @ thin), mx.array(np.asarray(small).T @ given)

    def _below(
        self, given: FloatArray, thin: FloatArray, a: mx.array, kept: mx.array | None, shape: tuple[int, ...]
    ) -> mx.array:
        below, rows = _product(given, _weight(self.linear), shape)
        own = thin @ np.asarray(a).T
        rows += own if kept is None else rows_of(kept) * own
        return below


def spare_first_slopes(model: nn.Module, run: Callable[[], object]) -> None:
    """No slope of the input of those adapted layers that `run`, a forward pass, gives the first input of all."""
    layers = [module for module in model.modules() if isinstance(module, _AdaptedLinear)]
    given: list[tuple[_AdaptedLinear, mx.array]] = []
    for layer in layers:
        layer.__dict__["given"] = given
    run()
    for layer in layers:
        del layer.__dict__["given"]
    others = {id(layer) for layer, x in given if x is not given[0][1]}
    for layer, _ in given:
        layer.__dict__["first"] = id(layer) not in others


def _seen(x: mx.array, kept: mx.array | None) -> FloatArray:
    """What the adapter sees of x after dropout. [N, in]"""
    return rows_of(x) if kept is None else rows_of(x) * rows_of(kept)


_ROTARY = (nn.RoPE, rope_utils.Llama3RoPE, rope_utils.YarnRoPE)
_FAST: dict[type, type[Any]] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    AdaptedLinear: _AdaptedLinear,
    nn.RMSNorm: RMSNorm,
    nn.LayerNorm: apart_from_the_trace(nn.LayerNorm),
    **{kind: rotary(kind) for kind in _ROTARY},
}
