"""Data parallelism: gradients of all processes summed in one all-reduce, which also carries their status.

Behind the gradients and the loss stand, as numbers that float32 holds exactly: supervised tokens, whether a process
lacks memory, the signals that ask it to stop, what the first process orders, its learning rate, and now and then a hash
of each process's state.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.interface import BackendError, Lost, OutOfMemory, TrainState
from backends.process_messages import digest
from backends.timeouts import PATIENCE, waiting

GO, LEAVE, ABANDON = 0, 1, 2  # the first process: one more step; this is the last one; this one does not count
CHECK_EVERY = 25  # steps between two comparisons of the processes' bytes
_PIECES = 4  # of 16 bits: so much of 8 bytes is exact in a float32
_TOKENS, _MEMORY, _INTERRUPT, _TERMINATE, _ORDER, _RATE = range(6)
_DIGESTS = _RATE + _PIECES


@contextmanager
def exchange(patience: float = PATIENCE) -> Iterator[None]:
    """Inside, the processes exchange something: an engine's RuntimeError means that one is gone. patience: seconds."""
    with waiting(patience):
        try:
            yield
        except RuntimeError as error:
            raise Lost(f"another process of this run has ended ({str(error).partition(chr(10))[0]:.200})") from error


def not_met(error: Exception) -> Lost:
    """What a process raises that does not find the others at the beginning."""
    return Lost(
        f"the processes do not find each other ({str(error).partition(chr(10))[0]:.200}); start all of them at the "
        "same time, and let no firewall part their machines"
    )


class Abandoned(Exception):
    """The first process called a step off before it was one; nothing changed."""


class Apart(BackendError):
    """The processes of a run do not compute the same: other rows, or other bytes after the same steps."""


class Group(Protocol):
    """The processes of a run, as an engine joins them. Every method raises Lost."""

    rank: int  # of this process, from 0
    size: int

    def sum(self, tensors: Sequence[Any], tail: NDArray[np.float32]) -> tuple[Sequence[Any], NDArray[np.float32]]:
        """Sums over all processes, in one exchange. tensors: the engine's own, float32; they may be overwritten."""

    def zeros(self, numbers: int) -> Sequence[Any]:
        """Tensors of so many zeros together, for a process that has nothing to add."""

    def broadcast(self, message: bytes | None) -> bytes:
        """The first process's message, in every process; None from the others."""

    def gather(self, message: bytes) -> list[bytes]:
        """Every process's message, in the order of ranks."""

    def close(self) -> None:
        """The connections end; what is not sent yet is lost."""


@dataclass
class Team:
    """The one thing that a session has beside a single process's. `whole` comes before each of its steps."""

    group: Group
    state: Callable[[], TrainState]  # of this process's session
    stop: Callable[[], int] = int  # the signal that asked this process to stop, or 0
    weight: float = 0.0  # of all rows of the step, by which its loss is divided
    tokens: int = 0  # supervised, in all rows of the step
    summed: bool = False  # whether this step's sum was made
    left: bool = False  # whether it was the last one for now
    lacking: bool = False  # whether it could not be made for lack of memory
    heard: int = 0  # the signal that asked any process to stop
    sums: int = 0  # made so far
    _mine: int = field(default=0, repr=False)
    _order: int = field(default=GO, repr=False)
    _step: int = field(default=0, repr=False)
    _mark: bytes | None = field(default=None, repr=False)

    def whole(self, step: int, weight: float, tokens: int, mine: int, order: int = GO) -> None:
        """What is known of the step after `step` done ones. mine: this process's share of `tokens`."""
        self.weight, self.tokens, self._mine, self._step = weight, tokens, mine, step
        self._order, self.summed, self.left, self.lacking = order, False, False, False
        self._mark = digest(self.state()) if step % CHECK_EVERY == 0 else None

    def sum(self, tensors: Sequence[Any], rate: float) -> tuple[Sequence[Any], float]:
        """The sums over all processes, and the first one's learning rate.

        Raises OutOfMemory in every process where one lacks memory, Abandoned, Lost, or Apart.
        """
        summed, heard = self.group.sum(tensors, self._tail(rate, lacking=False))
        return summed, self._hear(heard)

    def absent(self, lacking: bool = False, order: int = GO) -> None:
        """Takes part in the step's sum and adds nothing. Raises as `sum`."""
        self._order = order
        numbers = sum(tensor.size for tensor in self.state().adapter.values()) + 1  # the loss stands behind them
        _, heard = self.group.sum(self.group.zeros(numbers), self._tail(0.0, lacking))
        self._hear(heard)

    def say_lack(self) -> None:
        """That this process lacks memory for the step, unless its sum was made: then all know of it."""
        if not self.summed:
            with suppress(OutOfMemory, Abandoned):
                self.absent(lacking=True)

    def _tail(self, rate: float, lacking: bool) -> NDArray[np.float32]:
        tail = np.zeros(_DIGESTS + _PIECES * self.group.size, np.float32)
        tail[_TOKENS], tail[_MEMORY] = self._mine, lacking
        asked = self.stop()
        tail[_INTERRUPT], tail[_TERMINATE] = asked == signal.SIGINT, asked not in (0, signal.SIGINT)
        if self.group.rank == 0:
            tail[_ORDER], tail[_RATE:_DIGESTS] = self._order, _pieces(np.float64(rate).tobytes())
        if self._mark is not None:
            start = _DIGESTS + _PIECES * self.group.rank
            tail[start : start + _PIECES] = _pieces(self._mark)
        return tail

    def _hear(self, tail: NDArray[np.float32]) -> float:
        self.summed, self.sums = True, self.sums + 1
        self.heard = signal.SIGTERM if tail[_TERMINATE] else signal.SIGINT if tail[_INTERRUPT] else 0
        self.left = tail[_ORDER] != GO
        if tail[_ORDER] == ABANDON:
            raise Abandoned
        if tail[_MEMORY]:
            self.lacking = True
            raise OutOfMemory(f"in {int(tail[_MEMORY])} of {self.group.size} processes")
        if tail[_TOKENS] != self.tokens:
            raise Apart(
                f"step {self._step + 1}: the processes have {int(tail[_TOKENS]):,} supervised tokens together, and the "
                f"step has {self.tokens:,}; give every process the same rows and the same version of finetune"
            )
        marks = tail[_DIGESTS:].reshape(self.group.size, _PIECES)
        compare([mark.tobytes() for mark in marks], self._step)
        return float(np.frombuffer(_bytes(tail[_RATE:_DIGESTS]), np.float64)[0])


def compare(marks: Sequence[bytes], step: int) -> None:
    """Raises Apart where the processes' hashes differ after so many steps."""
    others = [str(rank) for rank, mark in enumerate(marks) if mark != marks[0]]
    if others:
        named = f"process{'es' * (len(others) > 1)} {', '.join(others)}"
        raise Apart(
            f"after step {step} {named} and process 0 hold different numbers, which equal steps never give; "
            "nothing more is written. Use the same versions of the libraries and the same kind of device everywhere"
        )


def _pieces(value: bytes) -> NDArray[np.float32]:
    return np.frombuffer(value, np.uint16).astype(np.float32)


def _bytes(pieces: NDArray[np.float32]) -> bytes:
    return pieces.astype(np.uint16).tobytes()
