"""Products with a side as narrow as the adapter's rank, by kernels of our own where they run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch

from backends.torch_backend.fused import kernels_for
from backends.torch_backend.masks import Mask


def parts_of(low_rank: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """[N, r] of each layer."""
    return [low_rank] if count == 1 else low_rank.chunk(count, -1)


Drawn: TypeAlias = "Mask | torch.Tensor | None"  # a mask [N, M], before it is drawn only where our kernels draw it


def drawn(mask: Mask | None, x: torch.Tensor) -> Drawn:
    """Dropout's mask for products with x [N, M]."""
    return mask if mask is None or kernels_for(x, len(x)) is not None else mask.drawn()


def put(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: float, mask: Drawn = None) -> torch.Tensor:
    """scale * (mask x) y, y of a low rank, written to `out`. [N, M], [M, R] -> [N, R]"""
    if (kernels := kernels_for(x, len(x))) is None:
        return out.addmm_(_masked(x, mask), y, beta=0, alpha=scale)
    return kernels.down(out, _close(x), y, scale, mask)


def add(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask: Drawn = None) -> torch.Tensor:
    """mask (x y) of a low rank added to `out`. [N, R], [R, M] -> [N, M]"""
    if (kernels := kernels_for(out, len(out))) is not None:
        return kernels.add_up(out, x, y, mask)
    return out.addmm_(x, y) if mask is None else out.add_((x @ y).mul_(mask))


def gradient_of_a(low_rank: torch.Tensor, x: torch.Tensor, mask: Drawn = None) -> torch.Tensor:
    """low_rank^T (mask x) in float32. [N, R], [N, M] -> [R, M]"""
    if (kernels := kernels_for(x, len(x))) is None:
        return float32_product(low_rank.T, _masked(x, mask))
    out = x.new_empty(low_rank.shape[1], x.shape[1], dtype=torch.float32)
    return kernels.gradient(out, low_rank, _close(x), mask)


def gradient_of_b(x: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """x^T low_rank in float32. [N, M], [N, R] -> [M, R]"""
    if (kernels := kernels_for(x, len(x))) is None:
        return float32_product(x.T, low_rank)
    out = x.new_empty(x.shape[1], low_rank.shape[1], dtype=torch.float32)
    kernels.gradient(out.T, low_rank, _close(x))
    return out


def float32_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y in float32."""
    if x.dtype != torch.float32 and _sums_in_float32(x.device, x.dtype):
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()


@cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a product of such numbers whose result was never rounded to them; on a GPU it does."""
    x = torch.full((16, 16), 0.1, device=device, dtype=dtype)
    try:
        return bool(torch.allclose(torch.mm(x, x, out_dtype=torch.float32), x.float() @ x.float(), rtol=1e-2))
    except RuntimeError:
        return False


def _masked(x: torch.Tensor, mask: Drawn) -> torch.Tensor:
    return x if mask is None else x * mask


def _close(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a row beside each other, as our kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
