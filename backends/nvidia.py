"""Detects an NVIDIA card through its driver, without importing a framework."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# cuda.h: CUDA_ERROR_NO_DEVICE, and a driver library that is only for linking
_NO_DEVICE, _STUB_LIBRARY = 100, 34
_MAJOR, _MINOR = 75, 76  # of compute capability, among a device's attributes


@dataclass(frozen=True)
class Driver:
    """What the driver says of its cards."""

    cards: int
    cuda: tuple[int, int]  # the newest CUDA version that it runs
    error: int = 0  # of its start, by cuda.h; 0: it starts
    capability: tuple[int, int] = (7, 5)  # compute capability of the first card


def driver() -> Driver | None:
    """None: no card that this process may see, or no driver for one. CUDA_VISIBLE_DEVICES="" hides all cards."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, cards = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    error = int(library.cuInit(0))
    if error in (_NO_DEVICE, _STUB_LIBRARY):
        return None
    if error:
        return Driver(0, cuda, error)
    library.cuDeviceGetCount(ctypes.byref(cards))
    return Driver(cards.value, cuda, capability=_capability(library)) if cards.value else None


def _capability(library: Any) -> tuple[int, int]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), 0)
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return major.value, minor.value


def unused_by(library: str, built_for: str | None, build: Callable[[Driver], str | None]) -> str | None:
    """Why a library that found no card does not use the one that is there, and what to do; None: there is none.

    library: its name and version. built_for: the CUDA version that it is built for ("13.0"); None: for none.
    build: the command that installs one for such a driver and card; None where there is none.
    """
    found = driver()
    if found is None:
        return None
    if found.error:
        return (
            f"the NVIDIA driver is there and does not start (CUDA error {found.error}), so the card is not used; "
            "restart the machine, and install the driver again where that does not help"
        )
    cards = "an NVIDIA card is" if found.cards == 1 else f"{found.cards} NVIDIA cards are"
    newest, command = ".".join(map(str, found.cuda)), build(found)
    update = f"update the NVIDIA driver, which ends at CUDA {newest}"
    if built_for is None:
        return f"{cards} in this machine and not used: {library} is a build for the CPU; {command or update}"
    if int(built_for.split(".")[0]) > found.cuda[0]:
        remedy = f"{update}, or install a build for it: {command}" if command else update
        return f"{cards} in this machine and not used: {library} needs a driver for CUDA {built_for}; {remedy}"
    return f"{cards} in this machine and not used: {library} does not find it; run nvidia-smi to see what is wrong"
