"""Softmax attention with a gradient that computes the scores again, some queries at a time, and never keeps them.

The arithmetic is written once for MLX's arrays and for numpy's (FlashAttention's formulas: Dao et al., 2022, B.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from backends.mlx_backend.patch import rebound

_QUERIES = 256  # whose scores exist at once; where attention is causal, the keys after them are left out
_LOW = -1e30  # added to the score of a key that a query must not see

Mask = mx.array | str | None


class Attention:
    """In the place of mlx-lm's `scaled_dot_product_attention` in one model.

    Unless `always`, in training and on long rows only: otherwise little or nothing is kept, and MLX's own is faster.
    """

    def __init__(self, model: nn.Module, attend: Callable[..., mx.array], always: bool) -> None:
        self.training = False
        self._attend, self._always = attend, always
        rebound(model, "scaled_dot_product_attention", base.scaled_dot_product_attention, self)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Mask, **more: Any
    ) -> mx.array:
        """[B, H, L, d] of queries [B, H, L, d], keys and values [B, Hk, S, d]; `mask` as MLX takes it."""
        worth = self._always or (self.training and queries.shape[-2] > _QUERIES)
        if not worth or more.get("sinks") is not None or not _per_position(mask):
            out: mx.array = base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, **more)
            return out
        return self._attend(queries, keys, values, scale, mask)


def _per_position(mask: Mask) -> bool:
    """Whether it is the same for every head and says yes or no."""
    if mask is None or isinstance(mask, str):
        return True
    return bool(mask.dtype == mx.bool_ and (mask.ndim < 3 or mask.shape[-3] == 1))


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Attention by MLX's own operations."""

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return forward(MLX, q, k, v, scale, mask)

    @attention.vjp
    def gradient(inputs: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        (q, k, v), (out, norm) = inputs, outputs
        return backward(MLX, q, k, v, out, norm, slopes[0], scale, mask)

    found: Any = attention(queries, keys, values)
    return found[0]  # type: ignore[no-any-return]


MLX = SimpleNamespace(lib=mx, exp=mx.exp, after=mx.depends, queries=_QUERIES, in_place=False)


def forward(ops: Any, q: Any, k: Any, v: Any, scale: float, mask: Any) -> tuple[Any, Any]:
    """Attention [B, H, L, d], and the logarithm of its normaliser [B, H, L, 1]."""
    outs: list[Any] = []
    norms: list[Any] = []
    for first, last, end, low in _blocks(ops, q, k, mask):
        part = _grouped(q, k, first, last)
        scores = _scores(ops.after(part, outs[-1:]), k[..., :end, :], scale, low)
        top = scores.max(axis=-1, keepdims=True)
        scores -= top
        weights = ops.exp(scores)
        total = weights.sum(axis=-1, keepdims=True)
        outs.append(_ungrouped((_as(weights, v) @ v[..., :end, :]) / _as(total, v), q))
        norms.append(_ungrouped(top + ops.lib.log(total), q))
    return ops.lib.concatenate(outs, axis=-2), ops.lib.concatenate(norms, axis=-2)


def backward(
    ops: Any, q: Any, k: Any, v: Any, out: Any, norm: Any, slope: Any, scale: float, mask: Any
) -> tuple[Any, Any, Any]:
    """The slopes of q, k and v from that of the output [B, H, L, d]."""
    of_q: list[Any] = []
    of_k, of_v = ops.lib.zeros_like(k), ops.lib.zeros_like(v)
    for first, last, end, low in _blocks(ops, q, k, mask):
        part = ops.after(_grouped(q, k, first, last), of_q[-1:])
        given, normaliser = _grouped(slope, k, first, last), _grouped(norm, k, first, last)
        mean = (given * _grouped(out, k, first, last)).sum(axis=-1, keepdims=True)
        scores = _scores(part, k[..., :end, :], scale, low)
        scores -= normaliser
        weights = ops.exp(scores)
        by_weight = _as(given @ _turned(v[..., :end, :]), weights)
        by_weight -= mean
        by_weight *= weights
        by_score = _as(by_weight, q)
        of_q.append(_ungrouped(scale * (by_score @ k[..., :end, :]), q))
        of_k[..., :end, :] += _turned(by_score) @ (scale * part)
        of_v[..., :end, :] += _turned(_as(weights, v)) @ given
    return ops.lib.concatenate(of_q, axis=-2), of_k, of_v


def _blocks(ops: Any, q: Any, k: Any, mask: Any) -> Iterator[tuple[int, int, int, Any]]:
    """First and last query, how many keys they may see, and what to add to the scores of the last of these keys.

    [.., rows, the last keys], or None where nothing is hidden.
    """
    length, keys, copies = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    for first in range(0, length, ops.queries):
        last, low, end = min(first + ops.queries, length), None, keys
        if isinstance(mask, str):  # causal
            end = keys - length + last
            own = end - (last - first)  # keys before these are seen by all: where that saves work, left alone
            seen = ops.lib.arange(own, end)[:, None] >= ops.lib.arange(own if ops.in_place else 0, end)
        elif mask is not None:
            seen = ops.lib.broadcast_to(mask, (*mask.shape[:-1], keys))[..., first:last, :]
        if mask is not None:
            low = ops.lib.where(seen, 0.0, _LOW)
            low = ops.lib.concatenate([low] * copies, axis=-2)
        yield first, last, end, low


def _grouped(x: Any, k: Any, first: int, last: int) -> Any:
    """Queries [B, H, L, d] `first` to `last`, those that share a key's head one below the other. [B, Hk, R * n, d]"""
    batch, heads, length, depth = x.shape
    shared = k.shape[1]
    return x.reshape(batch, shared, heads // shared, length, depth)[..., first:last, :].reshape(
        batch, shared, -1, depth
    )


def _ungrouped(x: Any, q: Any) -> Any:
    """[B, Hk, R * n, d] -> [B, H, n, d]"""
    batch, heads, depth = q.shape[0], q.shape[1], x.shape[-1]
    return x.reshape(batch, heads, -1, depth)


def _scores(q: Any, k: Any, scale: float, low: Any) -> Any:
    """float32 [B, Hk, rows, keys]"""
    scores = (scale * q) @ _turned(k)
    if scores.dtype == mx.bfloat16:
        scores = scores.astype(mx.float32)
    if low is not None and low.shape[-1] == scores.shape[-1]:
        scores += low
    elif low is not None:
        scores[..., -low.shape[-1] :] += low
    return scores


def _turned(x: Any) -> Any:
    return x.swapaxes(-1, -2)


def _as(x: Any, like: Any) -> Any:
    return x if x.dtype == like.dtype else x.astype(like.dtype)
