"""CUDA kernels in Triton: products with a low-rank side, 4-bit weights unpacked, SwiGLU and rotary positions fused.

A product by cuBLAS costs a GPU's host four times as much as a kernel from here, and an adapted model makes many narrow
ones. Sums are in float32, each in one order, so that equal steps give equal bits. `fused` asks whether they work here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _down(x, factor, out, N, M, R, scale, sx, fm, fr, so, BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    rows = x + n[:, None].to(tl.int64) * sx
    total = tl.zeros((BN, BR), tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        left = tl.load(rows + m[None, :], mask=(n[:, None] < N) & (m[None, :] < M), other=0.0)
        right = tl.load(factor + m[:, None] * fm + r[None, :] * fr, mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        total = tl.dot(left, right, total)
    places = out + n[:, None].to(tl.int64) * so + r[None, :]
    tl.store(places, (total * scale).to(out.dtype.element_ty), mask=(n[:, None] < N) & (r[None, :] < R))


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _add_up(out, low, factor, N, M, R, so, sl, fr, fm, BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
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
    total += tl.load(places, mask=there, other=0.0).to(tl.float32)
    tl.store(places, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])  # else compiled anew for other numbers of rows
def _gradient(low, x, out, N, M, R, sl, sx, gr, gm, BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BM), tl.float32)
    for start in range(0, N, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        left = tl.load(low + n[None, :] * sl + r[:, None], mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)
        right = tl.load(x + n[:, None] * sx + m[None, :], mask=(n[:, None] < N) & (m[None, :] < M), other=0.0)
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


@triton.jit
def _swiglu(gate, up, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    active = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)  # rounded, as two operations round it
    tl.store(out + at, active * tl.load(up + at, mask=at < N, other=0.0).to(tl.float32), mask=at < N)


@triton.jit
def _swiglu_back(gate, up, grad, grad_up, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < N
    kind = grad.dtype.element_ty
    x = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    upstream = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    tl.store(grad_up + at, (x * share).to(kind).to(tl.float32) * upstream, mask=there)
    of_active = (upstream * tl.load(up + at, mask=there, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    tl.store(grad + at, of_active * share * (1.0 + x * (1.0 - share)), mask=there)


@triton.jit(do_not_specialize=["T"])
def _rotate(
    x, cos, sin, out, T, H, xb, xh, xt, ob, oh, ot, cb, ct,
    HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (h < H) & (d < HALF)
    start, angle = b * xb + t * xt + h * xh + d, b * cb + t * ct + d
    end = b * ob + t * ot + h * oh + d
    kind = out.dtype.element_ty
    first = tl.load(x + start, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + start + HALF, mask=there, other=0.0).to(tl.float32)
    inside = d < HALF
    cos1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    one, two = (first * cos1).to(kind).to(tl.float32), (second * cos2).to(kind).to(tl.float32)
    if BACK:
        tl.store(out + end, one + second * sin2, mask=there)
        tl.store(out + end + HALF, two - first * sin1, mask=there)
    else:
        tl.store(out + end, one - second * sin1, mask=there)
        tl.store(out + end + HALF, two + first * sin2, mask=there)


_COMPILED: dict[Hashable, Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[float, ...],
    constants: dict[str, int],
    relied_on: tuple[int, ...],
    **tuning: Any,
) -> None:
    """Runs the kernel, whose arguments are tensors, numbers and constants, in this order.

    Triton looks at every argument of each launch for what the code may rely on (types, multiples of 16, ones), which
    takes the host several times as long as to launch what it chose. So that is kept, by the numbers that the code may
    `rely on`, where all addresses are multiples of 16.
    """
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    first = tensors[0]
    key = (kernel, first.dtype, first.get_device(), relied_on, *constants.values()) if addresses % 16 == 0 else None
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants.values())
        return
    chosen = kernel[grid](*tensors, *numbers, **constants, **tuning)
    if key is not None and chosen is not None:  # Triton's interpreter chooses none
        _COMPILED[key] = chosen


def down(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x factor, written to `out`. [N, M], [M, R] -> [N, R]; the rows of x and of out lie close."""
    (rows, width), rank = x.shape, factor.shape[1]
    sizes = (width, rank, x.stride(0), factor.stride(0), factor.stride(1), out.stride(0))
    constants = {"BN": 32, "BM": 256, "BR": _side(rank)}
    grid = (_tiles(rows, 32), _tiles(rank, constants["BR"]))
    numbers = (rows, width, rank, scale, *sizes[2:])
    _launch(_down, grid, (x, factor, out), numbers, constants, sizes, num_stages=3)
    return out


def add_up(out: torch.Tensor, low: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """low factor added to `out`. [N, R], [R, M] -> [N, M]"""
    (rows, width), rank = out.shape, factor.shape[0]
    sizes = (width, rank, out.stride(0), low.stride(0), factor.stride(0), factor.stride(1))
    constants = {"BN": 64, "BM": 128, "BR": _side(rank)}
    _launch(_add_up, (_tiles(rows, 64), _tiles(width, 128)), (out, low, factor), (rows, *sizes), constants, sizes)
    return out


def gradient(out: torch.Tensor, low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """low^T x, written to `out` [R, M] of float32 and any strides. [N, R], [N, M]"""
    (rows, rank), width = low.shape, x.shape[1]
    sizes = (width, rank, low.stride(0), x.stride(0), out.stride(0), out.stride(1))
    tile = (128, 64) if width > 8192 else (256, 32)  # enough programs for a card
    constants = {"BN": tile[0], "BM": tile[1], "BR": _side(rank)}
    grid = (_tiles(width, tile[1]), _tiles(rank, constants["BR"]))
    _launch(_gradient, grid, (low, x, out), (rows, *sizes), constants, sizes, num_stages=3)
    return out


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
    _launch(_unpack, (_tiles(count, 1024),), tensors, (count,), constants, _of_length(count), enable_fp_fusion=False)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up"""
    out, count = torch.empty_like(gate), gate.numel()
    _launch(_swiglu, (_tiles(count, 1024),), (gate, up, out), (count,), {"BLOCK": 1024}, _of_length(count))
    return out


def swiglu_back(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, grad_up: torch.Tensor) -> None:
    """From the gradient of silu(gate) * up those of gate, written over it, and of up, written to `grad_up`."""
    count, tensors = grad.numel(), (gate, up, grad, grad_up)
    _launch(_swiglu_back, (_tiles(count, 1024),), tensors, (count,), {"BLOCK": 1024}, _of_length(count))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Heads [B, H, T, d] turned by angles [B or 1, 1, T, d], or their gradient turned back."""
    out = torch.empty_like(x)
    batch, heads, tokens, width = x.shape
    angles = (cos.stride(0) if len(cos) > 1 else 0, cos.stride(2))
    sizes = (heads, *x.stride()[:3], *out.stride()[:3], *angles)
    constants = {"HALF": width // 2, "HEADS": _power(heads), "WIDTH": _power(width // 2), "BACK": back}
    _launch(_rotate, (batch * tokens,), (x, cos, sin, out), (tokens, *sizes), constants, sizes)
    return out


def _of_length(count: int) -> tuple[int, ...]:
    """What code may rely on of a number of elements: divided by 16, and its type."""
    return (count % 16 == 0, count == 1, count >= 2**31)


def _tiles(length: int, side: int) -> int:
    """How many tiles cover so much. Triton's own function for it costs as much as a launch."""
    return -(-length // side)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _side(rank: int) -> int:
    """Of a tile: a product takes 16 at least."""
    return min(max(_power(rank), 16), 64)
