"""How fast this machine multiplies matrices: what the time of a run is predicted from."""

from __future__ import annotations

import time
from collections.abc import Callable

from backends.interface import Device

# Rows and width of a product: of the order of one layer's, and large enough to keep the device busy.
SIZES: dict[Device, tuple[int, int]] = {"cpu": (512, 2048), "gpu": (4096, 4096)}
_SECONDS = 0.15


def operations_per_second(products: Callable[[int], None], device: Device) -> float:
    """Of floating-point operations.

    `products(count)` multiplies [rows, width] by [width, width] of SIZES `count` times, one after the other, and waits
    once, at the end: on a fast GPU, a wait for each would be most of the time.
    """
    rows, width = SIZES[device]
    products(1)  # the first call starts threads and chooses kernels
    count = 1
    while True:
        begun = time.perf_counter()
        products(count)
        seconds = time.perf_counter() - begun
        if seconds >= _SECONDS:
            return count * 2.0 * rows * width * width / seconds
        count *= 2
