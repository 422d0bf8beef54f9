"""Chunked layout of arrays for `delta_rule`, and the triangular system of each chunk.

B rows, H key heads, R value heads for each of them, N chunks of C tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from backends.mlx_backend.blas_bridge import product

_CHUNK = 32  # tokens, a power of two
_AT_ONCE = 256  # tokens of all rows whose intermediate results exist at a time


class Chunks(NamedTuple):
    """The recurrence's inputs for consecutive chunks, in float32."""

    q: mx.array  # [B, H, 1, N, C, Dk]
    k: mx.array
    v: mx.array  # [B, H, R, N, C, Dv]
    decay: mx.array  # [B, H, R, N, C] logarithm of what remains of the state, at most 0
    beta: mx.array  # [B, H, R, N, C]


def unit_inverse(below: mx.array) -> mx.array:
    """(1 + L)^-1 of L [.., C, C] that is 0 on and above the diagonal, by halves: exact, unlike a series in powers of L,
    whose terms grow without bound where keys repeat."""
    size, width = below.shape[-1], 1
    inverse = mx.ones((*below.shape[:-2], size, 1, 1))  # of the blocks of `width` along the diagonal
    while width < size:
        pairs = below.reshape(*below.shape[:-2], size // (2 * width), 2 * width, size // (2 * width), 2 * width)
        corner = mx.moveaxis(mx.diagonal(pairs, axis1=-4, axis2=-2), -1, -3)[..., width:, :width]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        beside = mx.zeros_like(first)
        top = mx.concatenate([first, beside], axis=-1)
        bottom = mx.concatenate([-product(product(second, corner), first), second], axis=-1)
        inverse, width = mx.concatenate([top, bottom], axis=-2), 2 * width
    return inverse[..., 0, :, :]


def transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def lower(size: int, diagonal: int) -> mx.array:
    return mx.tri(size, k=diagonal, dtype=mx.float32)


def token_parts(k: mx.array) -> list[slice]:
    """The tokens whose intermediate results may exist at a time."""
    rows, length = k.shape[:2]
    step = _CHUNK * max(_AT_ONCE // (_CHUNK * rows), 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def chunked(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, part: slice, after: list[mx.array]
) -> Chunks:
    """Some tokens' inputs, once `after` is computed: otherwise all parts would be begun together."""
    heads, size = k.shape[2], _CHUNK
    while size // 2 >= part.stop - part.start:
        size //= 2
    pieces = mx.depends([x[:, part] for x in (q, k, v, decay, beta)], after)
    numbers = [in_chunks(x if x.ndim == 4 else x[..., None], heads, size) for x in pieces]
    return Chunks(*numbers[:3], *(x[..., 0] for x in numbers[3:]))


def in_chunks(x: mx.array, heads: int, size: int) -> mx.array:
    """[B, T, H R, d] -> float32 [B, H, R, N, C, d]; zeros after the last token."""
    rows, length, _, width = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return x.reshape(rows, -1, size, heads, x.shape[2] // heads, width).transpose(0, 3, 4, 1, 2, 5)


def unchunked(x: mx.array, part: slice) -> mx.array:
    """[B, H, R, N, C, (d)] -> [B, T, H R, d]"""
    x = x if x.ndim == 6 else x[..., None]
    rows, heads, repeats, _, _, width = x.shape
    return x.transpose(0, 3, 4, 1, 2, 5).reshape(rows, -1, heads * repeats, width)[:, : part.stop - part.start]


def of_key_heads(grad: mx.array) -> mx.array:
    """The sum over the value heads of a key head. [B, H, R, N, C, d] -> [B, H, 1, N, C, d]"""
    return grad.sum(2, keepdims=True)


def ours(state: mx.array, heads: int) -> mx.array:
    """[B, H R, Dv, Dk] -> float32 [B, H, R, Dk, Dv]"""
    by_key_head = state.astype(mx.float32).reshape(state.shape[0], heads, -1, *state.shape[2:])
    return by_key_head.swapaxes(-1, -2)


def theirs(state: mx.array) -> mx.array:
    return state.swapaxes(-1, -2).flatten(1, 2)
