"""What an MLX model computes between its matrix products on a CPU, in numpy: see `cpu_layers`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations

from backends.interface import FloatArray, IntArray
from backends.mlx_backend import attention as mlx_attention
from backends.mlx_backend.attention import Mask

_BLOCK = 2**16  # numbers of an array that are gone through together: they stay in the processor's cache
NUMPY = SimpleNamespace(lib=np, exp=lambda x: np.exp(x, out=x), after=lambda x, _: x, queries=96, in_place=True)


def room(shape: tuple[int, ...]) -> tuple[mx.array, FloatArray]:
    """An array of MLX's, and numpy's view of it to write the result into: no copy of it is made."""
    array = mx.array(np.empty(shape, np.float32))  # there at once; an evaluation would wait for MLX's thread
    return array, np.asarray(array)


def room_by_tokens(shape: tuple[int, ...]) -> tuple[mx.array, FloatArray]:
    """`room` for [B, H, L, d] that lies in memory as [B, L, H, d], as the layers before and after attention have it."""
    batch, heads, length, depth = shape
    array, view = room((batch, length, heads, depth))
    return array.swapaxes(1, 2), view.swapaxes(1, 2)


def rows_of(x: mx.array) -> FloatArray:
    return np.asarray(x).reshape(-1, x.shape[-1])


def weighted_nll(logits: mx.array, targets: IntArray, shares: FloatArray) -> tuple[mx.array, mx.array]:
    """As `head.weighted_nll`, with one exponential for both."""
    found, slope = room(logits.shape)
    with np.errstate(all="ignore"):
        np.subtract(np.asarray(logits), np.asarray(logits).max(axis=-1, keepdims=True), out=slope)
        each = np.arange(len(targets))
        picked = slope[each, targets]
        total = np.exp(slope, out=slope).sum(axis=-1)
        loss = (shares * (np.log(total) - picked)).sum(dtype=np.float32)
        slope *= (shares / total)[:, None]
        slope[each, targets] -= shares
    return mx.array(loss), found


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x"""
    y: Any = (_swiglu if gate.dtype == mx.float32 else activations.swiglu)(gate, x)
    return y  # type: ignore[no-any-return]


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    found, view = room(gate.shape)
    for g, u, out in blocks(gate, x, view):
        _sigmoid(g, out)
        out *= g
        out *= u
    return found


@_swiglu.vjp
def _swiglu_backward(inputs: Any, slope: mx.array, _product: mx.array) -> tuple[mx.array, mx.array]:
    (of_gate, gates), (of_x, xs) = (room(x.shape) for x in inputs)
    for g, u, given, gate, x in blocks(*inputs, slope, gates, xs):
        _sigmoid(g, gate)
        np.multiply(g, gate, out=x)  # silu' = s + silu (1 - s)
        silu = x.copy()
        x *= given
        rest = 1 - gate
        rest *= silu
        gate += rest
        gate *= given
        gate *= u
    return of_gate, of_x


def _sigmoid(x: FloatArray, out: FloatArray) -> None:
    with np.errstate(all="ignore"):
        np.negative(x, out=out)
        np.exp(out, out=out)
        out += 1
        np.reciprocal(out, out=out)


def blocks(*arrays: Any) -> Iterator[tuple[FloatArray, ...]]:
    """Rows of each that stay in the processor's cache together."""
    views = [rows_of(x) for x in arrays]
    size = max(_BLOCK // views[0].shape[-1], 1)
    return (tuple(view[row : row + size] for view in views) for row in range(0, len(views[0]), size))


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Attention, row after row: a row's scores stay in the processor's cache."""
    if queries.dtype != mx.float32:
        return mlx_attention.attend(queries, keys, values, scale, mask)
    masks = mask if mask is None or isinstance(mask, str) else np.asarray(mask)

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        (out, into), (norm, norms) = room_by_tokens(q.shape), room((*q.shape[:-1], 1))
        inputs = [np.asarray(x) for x in (q, k, v)]
        with np.errstate(all="ignore"):
            for row in _each(into):
                own_q, own_k, own_v = (x[row] for x in inputs)
                parts = mlx_attention.forward(NUMPY, own_q, own_k, own_v, scale, _of(masks, row))
                into[row], norms[row] = parts
        return out, norm

    @attention.vjp
    def gradient(inputs: Any, slopes: Any, outputs: Any) -> tuple[mx.array, ...]:
        found, into = zip(*(room_by_tokens(x.shape) for x in inputs), strict=True)
        given: list[Any] = [np.asarray(x) for x in (*inputs, *outputs, slopes[0])]
        with np.errstate(all="ignore"):
            for row in _each(into[0]):
                q, k, v, out, norm, slope = (x[row] for x in given)
                found_here = mlx_attention.backward(NUMPY, q, k, v, out, norm, slope, scale, _of(masks, row))
                for whole, part in zip(into, found_here, strict=True):
                    whole[row] = part
        return found

    result: Any = attention(queries, keys, values)
    return result[0]  # type: ignore[no-any-return]


def _each(x: FloatArray) -> Iterator[slice]:
    return (slice(row, row + 1) for row in range(len(x)))


def _of(masks: Any, row: slice) -> Any:
    """One row's mask."""
    return masks[row] if isinstance(masks, np.ndarray) and masks.ndim == 4 and len(masks) > 1 else masks
