"""Softmax attention with a gradient that computes the scores again, some queries at a time, and never keeps them.

The formulas are FlashAttention's (Dao et al., 2022, B.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from backends.mlx_backend.patch import rebound

TILE = 256  # queries whose scores exist at once; where attention is causal, the keys after them are left out
_HIDDEN = -1e30  # added to the score of a key that a query must not see

Mask = mx.array | str | None


class TiledAttention:
    """In the place of mlx-lm's `scaled_dot_product_attention` in one model.

    In training and on long rows only: otherwise little or nothing is kept for the gradient, and MLX's own is faster.
    """

    def __init__(self, model: nn.Module) -> None:
        self.training = False
        self.at_once = False  # whether products around it are computed while MLX traces
        self.used = self.serve(model)

    def serve(self, model: nn.Module) -> bool:
        """Whether any of the model's modules calls it from here on."""
        return rebound(model, "scaled_dot_product_attention", base.scaled_dot_product_attention, self)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Mask, **more: Any
    ) -> mx.array:
        """[B, H, L, d] of queries [B, H, L, d], keys and values [B, Hk, S, d]; `mask` as MLX takes it."""
        worth_it = self.training and queries.shape[-2] > TILE
        if not worth_it or more.get("sinks") is not None or not _is_per_position(mask):
            out: mx.array = base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, **more)
            return out
        return attend(queries, keys, values, scale, mask, self.at_once)


def _is_per_position(mask: Mask) -> bool:
    """Whether the mask is boolean and the same for every head."""
    if mask is None or isinstance(mask, str):
        return True
    return bool(mask.dtype == mx.bool_ and (mask.ndim < 3 or mask.shape[-3] == 1))


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask, at_once: bool = False
) -> mx.array:
    """Attention [B, H, L, d], differentiable by queries, keys and values.

    at_once: computed here, and not with the trace, which would keep all scores of all blocks to its end.
    """
    done = _alone if at_once else _as_it_is

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(done(q), done(k), done(v), scale, mask)

    @attention.vjp
    def backward(inputs: Any, grad_outputs: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        (q, k, v), (out, normaliser) = inputs, outputs
        return _backward(q, k, v, out, normaliser, grad_outputs[0], scale, mask, done)

    outputs: Any = attention(queries, keys, values)
    out: mx.array = outputs[0]
    return out


def _as_it_is(x: mx.array) -> mx.array:
    return x


def _alone(x: mx.array) -> mx.array:
    """Its numbers without what made them, which a trace keeps even where they are known."""
    return mx.array(np.asarray(x))


class _Tile(NamedTuple):
    """Some queries, and the keys that they may see."""

    first: int  # query
    last: int  # one past the last query
    keys: int  # so many, from the first key on
    bias: mx.array | None  # [.., R * queries, n] to add to the scores of the last n of these keys

    def scores(self, q: mx.array, k: mx.array, scale: float) -> mx.array:
        """float32 [B, Hk, R * queries, keys] of this tile's grouped queries."""
        scores = (scale * q) @ k[..., : self.keys, :].swapaxes(-1, -2)
        if scores.dtype != mx.float32:
            scores = scores.astype(mx.float32)
        if self.bias is not None and self.bias.shape[-1] == self.keys:
            scores += self.bias
        elif self.bias is not None:
            scores[..., -self.bias.shape[-1] :] += self.bias
        return scores

    def grouped(self, x: mx.array, key_heads: int) -> mx.array:
        """This tile's part of x [B, H, L, d]; the R heads that share a key head, one below the other.

        [B, Hk, R * queries, d]
        """
        batch, heads, length, width = x.shape
        by_key_head = x.reshape(batch, key_heads, heads // key_heads, length, width)
        return by_key_head[..., self.first : self.last, :].reshape(batch, key_heads, -1, width)

    def ungrouped(self, x: mx.array, heads: int) -> mx.array:
        """[B, Hk, R * queries, d] -> [B, H, queries, d]"""
        return x.reshape(x.shape[0], heads, self.last - self.first, x.shape[-1])


def _forward(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> tuple[mx.array, mx.array]:
    """Attention [B, H, L, d], and the logarithm of its normaliser [B, H, L, 1]."""
    outs: list[mx.array] = []
    normalisers: list[mx.array] = []
    heads, key_heads = q.shape[1], k.shape[1]
    for tile in _tiles(q, k, mask):
        scores = tile.scores(mx.depends(tile.grouped(q, key_heads), outs[-1:]), k, scale)  # one tile after another
        top = scores.max(axis=-1, keepdims=True)
        weights = mx.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = (weights.astype(v.dtype) @ v[..., : tile.keys, :]) / total.astype(v.dtype)
        outs.append(tile.ungrouped(out, heads))
        normalisers.append(tile.ungrouped(top + mx.log(total), heads))
    return mx.concatenate(outs, axis=-2), mx.concatenate(normalisers, axis=-2)


def _backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    out: mx.array,
    normaliser: mx.array,
    grad_out: mx.array,
    scale: float,
    mask: Mask,
    done: Callable[[mx.array], mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradients by q, k and v from that by the output [B, H, L, d]. `done` is given what each tile has made."""
    grads_q: list[mx.array] = []
    grad_k, grad_v = mx.zeros_like(k), mx.zeros_like(v)
    heads, key_heads = q.shape[1], k.shape[1]
    for tile in _tiles(q, k, mask):
        queries = mx.depends(tile.grouped(q, key_heads), grads_q[-1:])
        grad = tile.grouped(grad_out, key_heads)
        mean = (grad * tile.grouped(out, key_heads)).sum(axis=-1, keepdims=True)
        weights = mx.exp(tile.scores(queries, k, scale) - tile.grouped(normaliser, key_heads))
        grad_weights = (grad @ v[..., : tile.keys, :].swapaxes(-1, -2)).astype(weights.dtype)
        grad_scores = ((grad_weights - mean) * weights).astype(q.dtype)
        grads_q.append(done(tile.ungrouped(scale * (grad_scores @ k[..., : tile.keys, :]), heads)))
        grad_k[..., : tile.keys, :] += grad_scores.swapaxes(-1, -2) @ (scale * queries)
        grad_v[..., : tile.keys, :] += weights.astype(v.dtype).swapaxes(-1, -2) @ grad
        grad_k, grad_v = done(grad_k), done(grad_v)
    return mx.concatenate(grads_q, axis=-2), grad_k, grad_v


def _tiles(q: mx.array, k: mx.array, mask: Mask) -> Iterator[_Tile]:
    length, keys, repeats = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    for first in range(0, length, TILE):
        last = min(first + TILE, length)
        if mask is None:
            yield _Tile(first, last, keys, None)
            continue
        seen_keys = keys
        if isinstance(mask, str):  # causal
            seen_keys = keys - length + last
            diagonal = mx.arange(seen_keys - (last - first), seen_keys)  # all queries here see the keys before these
            visible = diagonal[:, None] >= diagonal
        else:
            visible = mx.broadcast_to(mask, (*mask.shape[:-1], keys))[..., first:last, :]
        bias = mx.where(visible, 0.0, _HIDDEN)
        yield _Tile(first, last, seen_keys, mx.concatenate([bias] * repeats, axis=-2))
