"""Hidden states of frozen layers, computed once per row and cached in a temporary file for the whole run.

Below the first adapted layer nothing is trained and dropout is off, so a row's hidden states there are a pure
function of its tokens: computed once, they are read back each time the row is seen again, in training and in
evaluation. They lie in a file, and the machine's spare memory caches it: none of it is the process's own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from backends.interface import IntArray

_SHARE = 2  # one part in so many of the free disk may be taken
_NO_RESERVING = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # some file systems, and other systems than Linux
NEEDED = (
    "what the frozen blocks make of each row is kept there, since the model does not fit in memory. Make room, or set "
    "the variable TMPDIR to a folder on a larger disk; what the run has saved is whole, and `finetune resume` goes on"
)


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
        folder = self._folder = folder_on_disk()
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
        self.read(offset, out)
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

    def lacking(self, rows: Iterable[IntArray]) -> list[IntArray]:
        """Those of the rows that are not kept, each once."""
        found = {_key(tokens): tokens for tokens in rows}
        return [tokens for key, tokens in found.items() if key not in self._offsets]

    @contextmanager
    def passing(self, rows: Sequence[IntArray]) -> Iterator[Passing]:
        """Room for the states of rows that pass through the blocks together, whatever the limit is; kept at the end.

        Raises OSError, which names the folder, where the disk has too little.
        """
        ends = self.bytes + np.cumsum([len(tokens) for tokens in rows]) * self.width * self.dtype.itemsize
        starts, end = [self.bytes, *map(int, ends[:-1])], int(ends[-1])
        with self._naming_folder():
            _reserve(self._file.fileno(), starts[0], end - starts[0], self._folder)
        self.bytes = end
        try:
            yield Passing(self, rows, starts)
            self._offsets |= {_key(tokens): start for tokens, start in zip(rows, starts, strict=True)}
        finally:
            if self.bytes == end and _key(rows[0]) not in self._offsets:
                self.bytes = starts[0]

    def read(self, offset: int, out: NDArray[Any]) -> None:
        self._file.seek(offset)
        if self._file.readinto(_bytes(out)) != out.nbytes:
            raise OSError("the temporary file of kept activations was cut short by something else")

    def write(self, offset: int, states: NDArray[Any]) -> None:
        """Raises OSError, which names the folder."""
        with self._naming_folder():
            self._file.seek(offset)
            self._file.write(_bytes(np.ascontiguousarray(states)))
            self._file.flush()

    @contextmanager
    def _naming_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{error.strerror}; {NEEDED}"
            raise OSError(error.errno, message, self._folder) from error


class Passing:
    """Rows on their way through the blocks: the states of each are read, and written again in their place."""

    def __init__(self, file: Activations, rows: Sequence[IntArray], starts: Sequence[int]) -> None:
        self._file, self.rows, self._starts = file, rows, starts

    def get(self, row: int) -> NDArray[Any]:
        """What was last put. [n, width]"""
        states = np.empty((len(self.rows[row]), self._file.width), self._file.dtype)
        self._file.read(self._starts[row], states)
        return states

    def put(self, row: int, states: NDArray[Any]) -> None:
        """[n, width]. Raises OSError, which names the folder."""
        self._file.write(self._starts[row], states)


class Keeping:
    """What a session says of its kept states."""

    _forward: Any  # whose `frozen` has them, and is None where none are kept

    @property
    def kept_states(self) -> Activations | None:
        kept: Activations | None = self._forward.frozen and self._forward.frozen.kept
        return kept

    def take_kept_states(self, states: Activations | None) -> None:
        frozen = self._forward.frozen
        if frozen and states and frozen.kept.serves(states):
            frozen.kept = states


def folder_on_disk() -> str:
    """The folder for temporary files; /var/tmp where that one is in memory, as /tmp is on several systems.

    A folder that the user names (TMPDIR) is taken as it is.
    """
    folder, disk = tempfile.gettempdir(), "/var/tmp"
    if "TMPDIR" in os.environ or not os.access(disk, os.W_OK | os.X_OK):
        return folder
    mounted = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    holding = next((str(path) for path in [Path(folder), *Path(folder).parents] if str(path) in mounted), "")
    return disk if mounted.get(holding) in ("tmpfs", "ramfs") else folder


def _reserve(file: int, start: int, size: int, folder: str) -> None:
    """Raises OSError where the disk has no room for so many bytes from `start` on."""
    try:
        os.posix_fallocate(file, start, max(size, 1))
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_RESERVING:
            raise
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _key(tokens: IntArray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest_size=16).digest()


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B")
