"""What both screens show: the run so far, gathered from its events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune.events import Event, RunStarted, StepDone, Validated

RECENT = 20  # steps over which the speed is measured
CURVE = 2000  # steps whose loss is drawn


@dataclass
class Status:
    """Where a run is. Feed it every event in order."""

    clock: Callable[[], float] = time.monotonic  # seconds
    steps: int = 0  # in the whole run
    first_step: int = 0  # done before this process began
    last: StepDone | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=CURVE))
    validations: list[Validated] = field(default_factory=list)
    _began: float = 0.0
    _recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=RECENT))

    def note(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.steps, self.first_step = event.steps, event.step
        elif isinstance(event, StepDone):
            if self.last is None:  # the validation before the first step is not part of the pace
                self._began = self.clock() - event.seconds
            self.last = event
            self.losses.append(event.loss)
            self._recent.append(event)
        elif isinstance(event, Validated):
            self.validations.append(event)

    @property
    def tokens_per_second(self) -> float:
        """Of the examples, padding not counted, over the last steps."""
        return sum(one.useful_tokens for one in self._recent) / max(sum(one.seconds for one in self._recent), 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this process so far, validations included; None before its first step."""
        done = self.last.step - self.first_step if self.last else 0
        if self.last is None or done <= 0:
            return None
        return (self.clock() - self._began) / done * (self.steps - self.last.step)


def duration(seconds: float | None) -> str:
    """`1:02:03`; `-:--:--` for None."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def amount(count: float) -> str:
    """Bytes as people say them: `1.4 GB` (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
