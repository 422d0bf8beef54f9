"""How long a process waits for the others of its run, and what happens when one does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 600.0  # seconds that a process may not answer while it is waited for
FOREVER = 2.6e6  # a month: how long one waits for the first process, which may work alone
_TICK, _GRACE = 0.5, 10.0  # seconds; the second: after another process has failed
_waiting: list[float] = []  # the wait in hand: how long it may last, in seconds; empty: none


@contextmanager
def waiting(patience: float = PATIENCE) -> Iterator[None]:
    _waiting[:] = [patience]
    try:
        yield
    finally:
        _waiting.clear()


def watch(failed: Callable[[], str | None], give_up: Callable[[str], None]) -> None:
    """In a thread: `give_up` with a sentence where a wait lasts too long, which native code would never end.

    failed: what is known of a process that has failed; its connections then should have ended the wait.
    The time of a process that was itself stopped (Ctrl-Z) does not count.
    """

    def look() -> None:
        waited = after = 0.0
        while True:
            time.sleep(_TICK)
            patience = _waiting[0] if _waiting else None
            waited = 0.0 if patience is None else waited + _TICK
            reason = failed()
            after = after + _TICK if reason and patience is not None else 0.0
            if reason and after > _GRACE:
                give_up(reason)
            elif patience is not None and waited > patience:
                give_up(f"another process of this run has not answered for {patience:.0f} s")

    threading.Thread(target=look, daemon=True).start()
