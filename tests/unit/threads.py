"""The processes of a run as threads of this one, on the reference backend: what they exchange is counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.interface import LoraSpec, Lost, ModelSpec, OptimSpec, Session
from backends.process_group import SharedSession, lead, led
from finetune.data.rows import Prepared
from finetune.training.step_shares import share_of
from tests.unit.toy_run import model_folder

PATIENCE = 30.0  # seconds


class Room:
    """Where all threads of a group meet."""

    def __init__(self, size: int) -> None:
        self.size, self.counts = size, Counter[str]()
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)


class ThreadGroup:
    """`team.Group` of one thread."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, room.size

    def _meet(self, kind: str, mine: Any) -> list[Any]:
        """What every thread brought. Raises Lost where one has gone."""
        self.room.counts[kind] += self.rank == 0
        self.room.slots[self.rank] = kind, mine
        try:
            self.room.barrier.wait()
            brought = list(self.room.slots)
            self.room.barrier.wait()
        except threading.BrokenBarrierError:
            raise Lost("a thread has ended") from None
        assert {one[0] for one in brought} == {kind}, "the threads do different things"
        return [one[1] for one in brought]

    def sum(self, tensors: Sequence[Any], tail: Any) -> tuple[Sequence[Any], Any]:
        flat = np.concatenate([*(np.ravel(one) for one in tensors), tail]).astype(np.float32)
        whole = np.sum(self._meet("sum", flat), axis=0, dtype=np.float32)
        ends = np.cumsum([np.size(one) for one in tensors])
        parts = np.split(whole, ends)
        return [part.reshape(np.shape(one)) for part, one in zip(parts, tensors, strict=False)], parts[-1]

    def zeros(self, numbers: int) -> Sequence[Any]:
        return [np.zeros(numbers, np.float32)]

    def broadcast(self, message: bytes | None) -> bytes:
        told: bytes = self._meet("tell", message)[0]
        return told

    def gather(self, message: bytes) -> list[bytes]:
        return self._meet("gather", message)

    def close(self) -> None:
        """Others may still read what was told last."""


def reopened(folder: Path) -> Session:
    """As `toy_run.session`, which writes the folder anew, and so must not be called in two threads."""
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.2)
    return registry.open_session("reference", ModelSpec(folder / "model"), lora, OptimSpec(), 0)


@contextmanager
def together(
    folder: Path,
    size: int,
    rows: Prepared,
    wrap: Callable[[Session, int], Session] = lambda live, rank: live,
    stop: Callable[[int], int] = lambda rank: 0,
) -> Iterator[tuple[SharedSession, Room]]:
    """The first thread's session, with the others behind it. wrap: what a rank has instead of its session."""
    room, failures = Room(size), list[BaseException]()
    model_folder(folder / "model")

    def follower(rank: int) -> None:
        try:
            live = wrap(reopened(folder), rank)
            led(
                live,
                ThreadGroup(room, rank),
                lambda: stop(rank),
                lambda cut: share_of(rows.train.examples, cut, rank, size),
            )
        except Lost:
            pass
        except BaseException as error:
            failures.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=follower, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    try:
        shared = lead(wrap(reopened(folder), 0), ThreadGroup(room, 0), size)
        yield shared, room
        shared.end()
    finally:
        room.barrier.abort()
        for thread in threads:
            thread.join()
    assert not failures, failures
