"""What an MLX model computes between its matrix products on a CPU, in numpy: see `mlx_cpu`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations

from backends.interface import FloatArray, IntArray
from backends.mlx_backend import attention as mlx_attention
from backends.mlx_backend.attention import Mask

_BLOCK = 32  # rows that are gone through together
_NUMPY = SimpleNamespace(lib=np, exp=lambda x: np.exp(x, out=x), after=lambda x, _: x)


def room(shape: tuple[int, ...]) -> tuple[mx.array, FloatArray]:
    """An array of MLX's, and numpy's view of it to write the result into: no copy of it is made."""
    array = mx.zeros(shape)
    mx.eval(array)
    return array, np.asarray(array)


def rows_of(x: mx.array) -> FloatArray:
    return np.asarray(x).reshape(-1, x.shape[-1])


def weighted_nll(logits: mx.array, targets: IntArray, shares: FloatArray) -> tuple[mx.array, mx.array]:
    """As `mlx_loss.weighted_nll`, with one exponential for both."""
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
    for g, u, out in _blocks(gate, x, view):
        np.multiply(g * _sigmoid(g), u, out=out)
    return found


@_swiglu.vjp
def _swiglu_backward(inputs: Any, slope: mx.array, _product: mx.array) -> tuple[mx.array, mx.array]:
    (of_gate, gates), (of_x, xs) = (room(x.shape) for x in inputs)
    for g, u, given, gate, x in _blocks(*inputs, slope, gates, xs):
        open_ = _sigmoid(g)  # silu' = s + g s (1 - s)
        np.multiply(given, g * open_, out=x)
        np.multiply(given * u, open_ * (1 + g * (1 - open_)), out=gate)
    return of_gate, of_x


def _sigmoid(x: FloatArray) -> FloatArray:
    with np.errstate(all="ignore"):
        below = np.exp(-x)
        below += 1
        return np.reciprocal(below, out=below)


def _blocks(*arrays: Any) -> Iterator[tuple[FloatArray, ...]]:
    """Rows of each that stay in the processor's cache together."""
    views = [rows_of(x) for x in arrays]
    return (tuple(view[row : row + _BLOCK] for view in views) for row in range(0, len(views[0]), _BLOCK))


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Attention, row after row: a row's scores stay in the processor's cache."""
    if queries.dtype != mx.float32:
        return mlx_attention.attend(queries, keys, values, scale, mask)
    masks = mask if mask is None or isinstance(mask, str) else np.asarray(mask)

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        (out, into), (norm, norms) = room(q.shape), room((*q.shape[:-1], 1))
        inputs = [np.asarray(x) for x in (q, k, v)]
        with np.errstate(all="ignore"):
            for row in _each(into):
                own_q, own_k, own_v = (x[row] for x in inputs)
                parts = mlx_attention.forward(_NUMPY, own_q, own_k, own_v, scale, _of(masks, row))
                into[row], norms[row] = parts
        return out, norm

    @attention.vjp
    def gradient(inputs: Any, slopes: Any, outputs: Any) -> tuple[mx.array, ...]:
        found, into = zip(*(room(x.shape) for x in inputs), strict=True)
        given: list[Any] = [np.asarray(x) for x in (*inputs, *outputs, slopes[0])]
        with np.errstate(all="ignore"):
            for row in _each(into[0]):
                q, k, v, out, norm, slope = (x[row] for x in given)
                found_here = mlx_attention.backward(_NUMPY, q, k, v, out, norm, slope, scale, _of(masks, row))
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


def apart_from_the_trace(kind: type[Any]) -> type[Any]:
    """A module without trained weights that is computed again in the backward pass, on arrays of their own.

    MLX keeps every array between a traced input and what was evaluated of it; of this module only input and output.
    """

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        run = partial(kind.__call__, self)

        @mx.custom_function
        def alone(x: mx.array) -> mx.array:
            return _alone(run(_alone(x), *args, **kwargs))

        @alone.vjp
        def backward(x: mx.array, slope: mx.array, _y: mx.array) -> mx.array:
            (found,) = mx.vjp(lambda x: run(x, *args, **kwargs), [_alone(x)], [_alone(slope)])[1]
            return _alone(found)

        y: Any = alone(x) if x.dtype == mx.float32 else run(x, *args, **kwargs)
        return y  # type: ignore[no-any-return]

    return type(kind.__name__, (kind,), {"__call__": call})


def _alone(x: mx.array) -> mx.array:
    return mx.array(np.asarray(x))
