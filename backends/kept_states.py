"""What frozen layers make of a row, kept for a whole run in a temporary file.

Below the first adapted layer nothing is trained and dropout is off, so a row's hidden states there are a pure
function of its tokens: computed once, they are read back each time the row is seen again, in training and in
evaluation. They lie in a file, and the machine's spare memory caches it: none of it is the process's own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from backends.interface import IntArray

_SHARE = 2  # one part in so many of the free disk may be taken


class Activations:
    """Rows of hidden states by the tokens they belong to, until the space for them is used up.

    Attention is causal and rows are padded on the right, so `tokens` [n] are a row's tokens up to the last position
    that is needed, from its first one on; `states` [n, width] are what the frozen layers make of exactly them.
    """

    def __init__(self, width: int, dtype: DTypeLike, limit: int | None = None, blocks: int = 0) -> None:
        """`dtype` is numpy's (uint16 holds bfloat16); `limit` in bytes, half of the disk's free space if not given.

        blocks: how many are frozen.
        """
        self.width, self.dtype, self.blocks = width, np.dtype(dtype), blocks
        self.bytes = 0  # kept so far
        folder = _folder_on_disk()
        # no `with`: it lives as long as this object, and leaves no name
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._limit = shutil.disk_usage(folder).free // _SHARE if limit is None else limit
        self._offsets: dict[bytes, int] = {}

    def serves(self, other: Activations) -> bool:
        """Whether they are what other sessions of the same base keep, whatever their adapters are."""
        return (self.width, self.dtype, self.blocks) == (other.width, other.dtype, other.blocks)

    def get(self, tokens: IntArray, out: NDArray[Any]) -> bool:
        """Whether `tokens` [n] are kept; if so `out` [n, width], contiguous, is filled with their states."""
        offset = self._offsets.get(_key(tokens))
        if offset is None:
            return False
        self._file.seek(offset)
        if self._file.readinto(_bytes(out)) != out.nbytes:
            raise OSError("the temporary file of kept activations was cut short by something else")
        return True

    def put(self, tokens: IntArray, states: NDArray[Any]) -> None:
        """Keep `states` [n, width] of `tokens` [n]; does nothing once the space is used up."""
        key = _key(tokens)
        if key in self._offsets or self.bytes + states.nbytes > self._limit:
            return
        try:
            self._file.seek(self.bytes)
            self._file.write(_bytes(np.ascontiguousarray(states)))
            self._file.flush()
        except OSError:  # the disk is full: what is kept stays good
            self._limit = self.bytes
            return
        self._offsets[key] = self.bytes
        self.bytes += states.nbytes


def _folder_on_disk() -> str:
    """The folder for temporary files; /var/tmp where that one is in memory, as /tmp is on several systems.

    A folder that the user names (TMPDIR) is taken as it is.
    """
    folder, disk = tempfile.gettempdir(), "/var/tmp"
    if "TMPDIR" in os.environ or not os.access(disk, os.W_OK | os.X_OK):
        return folder
    mounted = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    holding = next((str(path) for path in [Path(folder), *Path(folder).parents] if str(path) in mounted), "")
    return disk if mounted.get(holding) in ("tmpfs", "ramfs") else folder


def _key(tokens: IntArray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest_size=16).digest()


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B")
