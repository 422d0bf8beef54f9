"""Sends rows to a streamed model in one pass through its files before they are scored."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from backends.interface import Batch, Reader
from backends.streaming import read_ahead
from finetune.events import Progress

AHEAD = "frozen blocks"  # of the progress


def ahead(session: Reader, batches: Iterable[tuple[object, Batch]]) -> Generator[Progress, None, None]:
    """What the frozen blocks make of these rows is kept afterwards. Nothing is done where the model is held whole."""
    for done, total in read_ahead(session, (batch for _, batch in batches)):
        yield Progress(0, AHEAD, done, total)
