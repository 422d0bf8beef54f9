"""Signals that stop a run, and temporary signal handlers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

STOPS = tuple(  # signals that ask a run to stop after its step
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def listened_to() -> list[int]:
    """The signals that stop a run here: SIGHUP not under nohup, which has it ignored."""
    return [n for n in STOPS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """In here these signals have these handlers; afterwards those that they had before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
