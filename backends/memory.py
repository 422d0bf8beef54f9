"""Memory of the process and the machine, for backends that run on the CPU."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import psutil


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


def release_freed() -> None:
    """Hand memory that was freed back to the system: glibc keeps it where something still lies above it."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def kept_bytes(tokens: int, hidden: int, number: int) -> int:
    """What frozen blocks make of rows, kept in a temporary file: `tokens` [of all rows, each counted up to its last
    supervised position] x hidden size x bytes of a number (2 in bfloat16)."""
    return tokens * hidden * number
