"""Whether own kernels run here: on a CUDA card, where Triton is there and they give what torch's operations give."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from backends.torch_backend.kernel_check import agrees

_FEW = 512  # rows: with fewer a kernel that takes them by tiles leaves most of a card idle


def kernels_for(x: torch.Tensor, rows: int) -> Any | None:
    """The module of kernels for so many rows of numbers like x; None: torch's own operations it is."""
    if not x.is_cuda or rows < _FEW:
        return None
    return kernels_on(x.device, x.dtype)


@cache
def kernels_on(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The module of kernels for this card and these numbers, tried before it is used; None: it does not work here."""
    if device.type != "cuda" or dtype == torch.float32:  # a card's products of float32 would be rounded
        return None
    try:
        from backends.torch_backend import triton_kernels

        with torch.inference_mode(), torch.random.fork_rng([device]):
            works = agrees(triton_kernels, device, dtype)
    except Exception:  # no Triton, none for this card, no compiler: as many errors as there are machines
        return None
    return triton_kernels if works else None
