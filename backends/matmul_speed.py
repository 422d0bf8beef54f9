"""Measures how fast this machine multiplies matrices, for the prediction of run time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from backends.interface import Device

# Rows and width of a product: of the order of one layer's, and large enough to keep the device busy.
SIZES: dict[Device, tuple[int, int]] = {"cpu": (512, 2048), "gpu": (4096, 4096)}
_SECONDS, _TIMES = 0.08, 3  # of one measurement; of several the median counts


def operations_per_second(x: Any, weight: Any, wait: Callable[[Any], object]) -> float:
    """Of floating-point operations, multiplying x [rows, width] by weight [width, width], both of a backend's arrays.

    `wait(y)` returns when y is computed. Many products follow one another before one wait: on a fast GPU, a wait for
    each would be most of the time.
    """
    rows, width = map(int, x.shape)
    _seconds(x, weight, wait, 1)  # the first call starts threads and chooses kernels
    count = 1
    while (seconds := _seconds(x, weight, wait, count)) < _SECONDS:
        count = max(2 * count, math.ceil(1.3 * count * _SECONDS / max(seconds, 1e-6)))  # by so many times too few
    taken = median([seconds, *(_seconds(x, weight, wait, count) for _ in range(_TIMES - 1))])
    return count * 2.0 * rows * width * width / taken


def numpy_rate() -> float:
    """The same of numpy's products in float32, on the processor."""
    rows, width = SIZES["cpu"]
    x, weight = np.ones((rows, width), np.float32), np.full((width, width), 1 / width, np.float32)
    return operations_per_second(x, weight, lambda y: y)


def _seconds(x: Any, weight: Any, wait: Callable[[Any], object], count: int) -> float:
    begun, y = time.perf_counter(), x
    for _ in range(count):
        y = y @ weight.T  # as a linear layer has it
    wait(y)
    return time.perf_counter() - begun
