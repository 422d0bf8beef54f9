"""Modules between an MLX model's matrix products on a CPU, in numpy and apart from the trace: see `cpu_layers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import FloatArray
from backends.mlx_backend.cpu_kernels import blocks, room, room_by_tokens


def apart_from_the_trace(kind: type[Any]) -> type[Any]:
    """A module without trained weights that is computed again in the backward pass, on arrays of their own.

    MLX keeps every array between a traced input and what was evaluated of it; of this module only input and output.
    """

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        run = partial(kind.__call__, self)

        def backward(x: mx.array, slope: mx.array) -> mx.array:
            (found,) = mx.vjp(lambda x: run(x, *args, **kwargs), [_alone(x)], [_alone(slope)])[1]
            return _alone(found)

        if x.dtype != mx.float32:
            plain: mx.array = run(x, *args, **kwargs)
            return plain
        return _own(lambda x: _alone(run(_alone(x), *args, **kwargs)), backward, x)

    return type(kind.__name__, (kind,), {"__call__": call})


def _own(
    forward: Callable[[mx.array], mx.array], backward: Callable[[mx.array, mx.array], mx.array], x: mx.array
) -> mx.array:
    """forward(x), whose gradient is backward(x, slope)."""
    function = mx.custom_function(forward)
    function.vjp(lambda x, slope, _y: backward(x, slope))
    y: Any = function(x)
    return y  # type: ignore[no-any-return]


def _alone(x: mx.array) -> mx.array:
    return mx.array(np.asarray(x))


class RMSNorm(nn.RMSNorm):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019)."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32:
            plain: mx.array = super().__call__(x)
            return plain
        return _own(self._forward, self._backward, x)

    def _forward(self, x: mx.array) -> mx.array:
        found, view = room(x.shape)
        weight = np.asarray(self.weight)
        with np.errstate(all="ignore"):
            for rows, out in blocks(x, view):
                np.multiply(rows, self._inverse(rows), out=out)
                out *= weight
        return found

    def _backward(self, x: mx.array, slope: mx.array) -> mx.array:
        """(s - x mean(s x) / rms^2) / rms, of s = slope * weight."""
        found, view = room(x.shape)
        weight = np.asarray(self.weight)
        with np.errstate(all="ignore"):
            for rows, given, out in blocks(x, slope, view):
                inverse = self._inverse(rows)
                np.multiply(given, weight, out=out)
                shared = _sums(out, rows) * np.square(inverse) / np.float32(rows.shape[-1])
                out -= shared * rows
                out *= inverse
        return found

    def _inverse(self, rows: FloatArray) -> FloatArray:
        """[N, 1]"""
        inverse: FloatArray = 1 / np.sqrt(_sums(rows, rows) / np.float32(rows.shape[-1]) + np.float32(self.eps))
        return inverse


def _sums(one: FloatArray, other: FloatArray) -> FloatArray:
    """Of the products in each row. [N, 1]"""
    sums: FloatArray = np.einsum("nd,nd->n", one, other)[:, None]
    return sums


def rotary(kind: type[Any]) -> type[Any]:
    """A rotary embedding that turns pairs of places by angles worked out once (Su et al., 2021).

    Its cosines and sines are what the module itself makes of pairs (1, 0). It takes over where a batch's rows begin
    at the same place and pairs lie half a head apart.
    """
    other = apart_from_the_trace(kind)

    def call(self: Any, x: mx.array, offset: Any = 0, **more: Any) -> mx.array:
        fits = x.dtype == mx.float32 and x.ndim == 4 and self.dims == x.shape[-1] and not self.traditional
        if not fits or more or not isinstance(offset, int):
            plain: mx.array = other.__call__(self, x, offset=offset, **more)
            return plain
        cos, sin = (table[offset : offset + x.shape[2]] for table in self._tables(offset + x.shape[2]))
        return _own(lambda x: _turned(x, cos, sin), lambda _, slope: _turned(slope, cos, -sin), x)

    def tables(self: Any, length: int) -> tuple[FloatArray, FloatArray]:
        """[at least `length`, 1, d] each."""
        kept: tuple[FloatArray, FloatArray] | None = self.__dict__.get("_kept")
        if kept is None or len(kept[0]) < length:
            half, rows = self.dims // 2, 2 * length
            unit = mx.concatenate([mx.ones((1, 1, rows, half)), mx.zeros((1, 1, rows, half))], axis=-1)
            cos, sin = np.split(np.asarray(kind.__call__(self, unit))[0, 0, :, None], 2, axis=-1)
            kept = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
            self.__dict__["_kept"] = kept
        return kept

    return type(kind.__name__, (other,), {"__call__": call, "_tables": tables})


@np.errstate(all="ignore")
def _turned(x: mx.array, cos: FloatArray, sin: FloatArray) -> mx.array:
    """cos x + sin (the other half of x), of x [B, H, L, d]; lies in memory as [B, L, H, d]."""
    found, view = room_by_tokens(x.shape)
    half = x.shape[-1] // 2
    for row, out in zip(np.asarray(x).swapaxes(1, 2), view.swapaxes(1, 2), strict=True):
        out[..., :half], out[..., half:] = row[..., half:], row[..., :half]
        out *= sin
        out += row * cos
    return found
