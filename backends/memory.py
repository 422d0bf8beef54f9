"""Memory of this process and this machine, for backends on the CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def process_peak_bytes() -> int:
    """The most memory this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int:
    """Memory the machine can still give without swapping."""
    return int(psutil.virtual_memory().available)


@contextmanager
def returning_freed() -> Iterator[None]:
    """In here a large block of memory goes back to the system when it is freed.

    glibc keeps freed blocks where something still lies above them: weights that were cast or quantised one after the
    other could be there several times over (measured: up to 2.1 GB for 0.4 GB of 4-bit weights).
    """
    try:
        libc = ctypes.CDLL(None)
        allow, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        yield
        return
    allow(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        trim(0)
        # where glibc's own rule arrives once a large block was freed; setting a threshold switched that rule off
        allow(_MMAP_THRESHOLD, 2**25)
        allow(_TRIM_THRESHOLD, 2**26)
