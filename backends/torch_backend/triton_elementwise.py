"""CUDA kernels in Triton: gated layers, RMS norms and rotary positions, each one operation where torch has many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backends.torch_backend.triton_launch import launch, of_length, power, tiles


@triton.jit
def _share(x, GELU: tl.constexpr):
    """What the activation multiplies x by: SiLU, or GELU in its form by tanh, which is x sigmoid(2 sqrt(2 / pi) ..)."""
    if GELU:
        return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return tl.sigmoid(x)


@triton.jit
def _gated(gate, up, out, N, BLOCK: tl.constexpr, GELU: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    active = (x * _share(x, GELU)).to(out.dtype.element_ty).to(tl.float32)  # rounded, as two operations round it
    tl.store(out + at, active * tl.load(up + at, mask=at < N, other=0.0).to(tl.float32), mask=at < N)


@triton.jit
def _gated_back(gate, up, grad, grad_up, N, BLOCK: tl.constexpr, GELU: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < N
    kind = grad.dtype.element_ty
    x = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    share = _share(x, GELU)
    slope = x * (1.0 - share)
    if GELU:
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    upstream = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    tl.store(grad_up + at, (x * share).to(kind).to(tl.float32) * upstream, mask=there)
    of_active = (upstream * tl.load(up + at, mask=there, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    tl.store(grad + at, of_active * share * (1.0 + slope), mask=there)


@triton.jit
def _rms_norm(x, weight, out, inverse_rms, D, eps, added, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * D + d
    numbers = tl.load(x + at, mask=d < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(numbers * numbers, 0) / D + eps)
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + added
    tl.store(out + at, numbers * inverse * gain, mask=d < D)
    tl.store(inverse_rms + row, inverse)


@triton.jit
def _rms_norm_back(x, weight, inverse_rms, grad, out, D, added, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * D + d
    inverse = tl.load(inverse_rms + row)
    normed = tl.load(x + at, mask=d < D, other=0.0).to(tl.float32) * inverse
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + added
    by_normed = tl.load(grad + at, mask=d < D, other=0.0).to(tl.float32) * gain
    mean = tl.sum(by_normed * normed, 0) / D
    tl.store(out + at, (by_normed - normed * mean) * inverse, mask=d < D)


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


def gated(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """activation(gate) * up; the activation is SiLU, or GELU by tanh."""
    out, count = torch.empty_like(gate), gate.numel()
    constants = {"BLOCK": 1024, "GELU": gelu}
    launch(_gated, (tiles(count, 1024),), (gate, up, out), (count,), constants, of_length(count))
    return out


def gated_back(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, grad_up: torch.Tensor, gelu: bool) -> None:
    """From the gradient of activation(gate) * up those of gate, written over it, and of up, written to `grad_up`."""
    count, tensors = grad.numel(), (gate, up, grad, grad_up)
    constants = {"BLOCK": 1024, "GELU": gelu}
    launch(_gated_back, (tiles(count, 1024),), tensors, (count,), constants, of_length(count))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, added: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + added), and 1 / sqrt(..) of each row [.., 1].

    The rows of x [.., D] lie close, and fill its memory in any order.
    """
    out, inverse_rms = torch.empty_like(x), torch.empty_like(x[..., :1], dtype=torch.float32)
    width, tensors = x.shape[-1], (x, weight, out, inverse_rms)
    constants = {"BLOCK": power(width)}
    launch(
        _rms_norm, (inverse_rms.numel(),), tensors, (width, eps, added), constants, (width,), num_warps=_warps(width)
    )
    return out, inverse_rms


def rms_norm_back(
    x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, grad: torch.Tensor, added: float
) -> torch.Tensor:
    """The gradient of x from that of `rms_norm`'s first result."""
    out, width = torch.empty_like(x), x.shape[-1]
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    tensors, constants = (x, weight, inverse_rms, grad, out), {"BLOCK": power(width)}
    rows = inverse_rms.numel()
    launch(_rms_norm_back, (rows,), tensors, (width, added), constants, (width,), num_warps=_warps(width))
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Heads [B, H, T, d] turned by angles [B or 1, 1, T, d], or their gradient turned back."""
    out = torch.empty_like(x)
    batch, heads, tokens, width = x.shape
    angles = (cos.stride(0) if len(cos) > 1 else 0, cos.stride(2))
    sizes = (heads, *x.stride()[:3], *out.stride()[:3], *angles)
    constants = {"HALF": width // 2, "HEADS": power(heads), "WIDTH": power(width // 2), "BACK": back}
    launch(_rotate, (batch * tokens,), (x, cos, sin, out), (tokens, *sizes), constants, sizes)
    return out


def _warps(width: int) -> int:
    """So many groups of 32 threads for a row."""
    return 4 if width <= 1024 else 8
