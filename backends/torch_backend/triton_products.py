"""CUDA kernels in Triton: products with a low-rank side, and 4-bit weights unpacked.

A product by cuBLAS costs a GPU's host four times as much as a kernel from here, and an adapted model makes many narrow
ones. Sums are in float32, each in one order, so that equal steps give equal bits.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from backends.torch_backend.triton_launch import launch, of_length, power, tiles


@triton.jit
def _kept(keys, features, n, m, N, M, limit):
    """Where `backends.dropout` keeps inputs m of tokens n."""
    key = tl.load(keys + n, mask=n < N, other=0)
    feature = tl.load(features + m // 2, mask=m < M, other=0)
    word = key[:, None] ^ feature[None, :]
    for _ in tl.static_range(2):
        word = word * 0x45D9F3B
        word = word ^ ((word >> 16) & 0xFFFF)
    half = tl.where((m % 2 == 1)[None, :], word, word << 16) >> 16  # signed
    return half < limit


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _down(
    x, factor, out, keys, features, N, M, R, scale, limit, sx, fm, fr, so,
    BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    rows = x + n[:, None].to(tl.int64) * sx
    total = tl.zeros((BN, BR), tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        left = tl.load(rows + m[None, :], mask=(n[:, None] < N) & (m[None, :] < M), other=0.0)
        right = tl.load(factor + m[:, None] * fm + r[None, :] * fr, mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        if DROPS:
            left = tl.where(_kept(keys, features, n, m, N, M, limit), left, 0.0)
        total = tl.dot(left, right, total)
    places = out + n[:, None].to(tl.int64) * so + r[None, :]
    tl.store(places, (total * scale).to(out.dtype.element_ty), mask=(n[:, None] < N) & (r[None, :] < R))


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _add_up(
    out, low, factor, keys, features, N, M, R, limit, so, sl, fr, fm,
    BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        left = tl.load(
            low + n[:, None].to(tl.int64) * sl + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0
        )
        right = tl.load(factor + r[:, None] * fr + m[None, :] * fm, mask=(r[:, None] < R) & (m[None, :] < M), other=0.0)
        total = tl.dot(left, right, total)
    places, there = out + n[:, None].to(tl.int64) * so + m[None, :], (n[:, None] < N) & (m[None, :] < M)
    if DROPS:
        total = tl.where(_kept(keys, features, n, m, N, M, limit), total, 0.0)
    total += tl.load(places, mask=there, other=0.0).to(tl.float32)
    tl.store(places, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _gradient(
    low, x, out, keys, features, N, M, R, limit, sl, sx, gr, gm,
    BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BM), tl.float32)
    for start in range(0, N, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        left = tl.load(low + n[None, :] * sl + r[:, None], mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)
        right = tl.load(x + n[:, None] * sx + m[None, :], mask=(n[:, None] < N) & (m[None, :] < M), other=0.0)
        if DROPS:
            right = tl.where(_kept(keys, features, n, m, N, M, limit), right, 0.0)
        total = tl.dot(left, right, total)
    tl.store(out + r[:, None] * gr + m[None, :] * gm, total, mask=(r[:, None] < R) & (m[None, :] < M))


@triton.jit
def _unpack(
    out, packed, scales, code, group_scales, group_offsets, levels, N, BLOCK: tl.constexpr, SHARING: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < N
    byte = tl.load(packed + at, mask=there, other=0)
    block = at // SHARING
    scale = tl.load(code + tl.load(scales + block, mask=there, other=0)) * tl.load(
        group_scales + block // 256, mask=there, other=0.0
    )
    scale += tl.load(group_offsets + block // 256, mask=there, other=0.0)
    first, second = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    both = tl.interleave(first.to(out.dtype.element_ty), second.to(out.dtype.element_ty))
    places = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + places, both, mask=places < 2 * N)


class Undrawn(Protocol):
    """A mask [N, M] of dropout, as the words that it is drawn from."""

    @property
    def keys(self) -> torch.Tensor: ...
    @property
    def features(self) -> torch.Tensor: ...
    @property
    def limit(self) -> int: ...


def down(
    out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, scale: float, mask: Undrawn | None = None
) -> torch.Tensor:
    """scale * (mask x) factor, written to `out`. [N, M], [M, R] -> [N, R]; the rows of x and of out lie close."""
    (rows, width), rank = x.shape, factor.shape[1]
    words, limit = _words(mask, x)
    strides, side = (x.stride(0), factor.stride(0), factor.stride(1), out.stride(0)), _side(rank)
    constants = {"BN": 32, "BM": 256 if side < 64 else 128, "BR": side}  # what an RTX 20's fast memory holds
    constants["DROPS"] = mask is not None
    grid, relied_on = (tiles(rows, 32), tiles(rank, side)), (width, rank, limit, *strides)
    numbers = (rows, width, rank, scale, limit, *strides)
    launch(_down, grid, (x, factor, out, *words), numbers, constants, relied_on, num_stages=3)
    return out


def add_up(out: torch.Tensor, low: torch.Tensor, factor: torch.Tensor, mask: Undrawn | None = None) -> torch.Tensor:
    """mask (low factor) added to `out`. [N, R], [R, M] -> [N, M]"""
    (rows, width), rank = out.shape, factor.shape[0]
    words, limit = _words(mask, out)
    sizes = (width, rank, limit, out.stride(0), low.stride(0), factor.stride(0), factor.stride(1))
    constants = {"BN": 64, "BM": 128, "BR": _side(rank), "DROPS": mask is not None}
    grid = (tiles(rows, 64), tiles(width, 128))
    launch(_add_up, grid, (out, low, factor, *words), (rows, *sizes), constants, sizes)
    return out


def gradient(out: torch.Tensor, low: torch.Tensor, x: torch.Tensor, mask: Undrawn | None = None) -> torch.Tensor:
    """low^T (mask x), written to `out` [R, M] of float32 and any strides. [N, R], [N, M]"""
    (rows, rank), width = low.shape, x.shape[1]
    words, limit = _words(mask, x)
    sizes = (width, rank, limit, low.stride(0), x.stride(0), out.stride(0), out.stride(1))
    side = _side(rank)
    tile = (128, 64) if width > 8192 else (256 if side < 64 else 128, 32)  # programs for a whole card
    constants = {"BN": tile[0], "BM": tile[1], "BR": side, "DROPS": mask is not None}
    grid = (tiles(width, tile[1]), tiles(rank, side))
    launch(_gradient, grid, (low, x, out, *words), (rows, *sizes), constants, sizes, num_stages=3)
    return out


def _words(mask: Undrawn | None, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """What a mask is drawn from, and its limit; without one, what a kernel does not read."""
    return ((x, x), 0) if mask is None else ((mask.keys, mask.features), mask.limit)


def unpack(
    out: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    code: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor],
    levels: torch.Tensor,
    sharing: int,
) -> torch.Tensor:
    """Weights of bitsandbytes' 4 bits in the type of `out`, to the bit what its kernels give.

    packed: two numbers a byte. scales: a byte for `sharing` numbers, a place in `code`; for 256 of them a scale and
    what is added (`groups`). levels: what the 16 values stand for.
    """
    count = packed.numel()
    constants = {"BLOCK": 1024, "SHARING": sharing // 2}
    tensors = (out, packed, scales, code, *groups, levels)
    launch(_unpack, (tiles(count, 1024),), tensors, (count,), constants, of_length(count), enable_fp_fusion=False)
    return out


def _side(rank: int) -> int:
    """Of a tile: a product takes 16 at least."""
    return min(max(power(rank), 16), 64)
