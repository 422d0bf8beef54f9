"""Models larger than memory: frozen blocks are read from disk when they compute, for many rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np

from backends.interface import Batch, IntArray, Reader
from backends.kept_states import folder_on_disk
from backends.micro_batches import joined
from backends.weight_plan import frozen_file_bytes

__all__ = [
    "STREAMED",
    "Advance",
    "Streams",
    "cannot_stream",
    "folder_on_disk",
    "frozen_file_bytes",
    "guarded",
    "read_ahead",
    "rows_of",
]

STREAMED = "frozen blocks read from the disk"  # in the words of `Session.shortcuts`
Advance = tuple[int, int]  # parts of the model done, of so many


@runtime_checkable
class Streams(Protocol):
    """A session that may hold a streamed model (`ModelSpec.streamed`)."""

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        """What the frozen blocks make of all these rows, computed and kept, in one pass through the model's files.

        What was not read ahead is computed when it is asked for, in a pass of its own. Nothing is done for a model that
        is held whole. Raises OutOfMemory, and OSError where the disk has too little room.
        """


def read_ahead(session: Reader, batches: Iterable[Batch]) -> Iterator[Advance]:
    """As `Streams.read_ahead`; nothing for other sessions."""
    return session.read_ahead(batches) if isinstance(session, Streams) else iter(())


def guarded(work: Iterator[Advance], guard: Callable[[], AbstractContextManager[object]]) -> Iterator[Advance]:
    """The same, each part of it in a context of its own: who takes them does other work between."""
    while True:
        with guard():
            advance = next(work, None)
        if advance is None:
            return
        yield advance


def rows_of(batch: Batch) -> Iterator[IntArray]:
    """The tokens of each row up to its last supervised position, which its kept states are known by."""
    whole = joined(batch)
    for tokens, weights in zip(whole.inputs, whole.weights, strict=True):
        supervised = np.flatnonzero(weights)
        yield np.ascontiguousarray(tokens[: supervised[-1] + 1 if supervised.size else 1])


def cannot_stream(path: object, why: str) -> str:
    """The refusal of a model that fits neither whole nor so, with the remedy."""
    return (
        f"{path}: this model does not fit in memory, and its frozen blocks cannot be read from the disk one by one "
        f"({why}); set quantize: 4bit, choose a smaller model, or a machine with more memory"
    )
