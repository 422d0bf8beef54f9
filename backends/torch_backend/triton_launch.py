"""Launches Triton's kernels with little work for a GPU's host."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_COMPILED: dict[Hashable, Any] = {}


def launch(
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


def of_length(count: int) -> tuple[int, ...]:
    """What code may rely on of a number of elements: divided by 16, and its type."""
    return (count % 16 == 0, count == 1, count >= 2**31)


def tiles(length: int, side: int) -> int:
    """How many tiles cover so much. Triton's own function for it costs as much as a launch."""
    return -(-length // side)


def power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
