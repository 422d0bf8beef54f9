"""Common parts of both screens, and the plain screen for pipes, log files and simple terminals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType

from finetune.console import Console
from finetune.events import (
    CheckpointSaved,
    Event,
    Finished,
    MemorySplit,
    Note,
    Progress,
    RunStarted,
    Samples,
    StepDone,
    StoppedEarly,
    Validated,
)
from finetune.recipe.schema import PREFERENCE
from finetune.report.eta import Pace
from finetune.text import amount, duration

PAUSE = 10.0  # seconds between two lines about the same work, or without any line ...
PARTS = 20  # ... but never fewer lines about steps than this in a whole run

RECENT = 20  # steps over which the speed is measured
CURVE = 4000  # points of the loss that are kept; of more steps, each is the mean of several


@dataclass
class Status:
    """Where a run is. Give it every event in order."""

    clock: Callable[[], float] = time.monotonic  # seconds
    last: StepDone | None = None
    peak_bytes: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)  # (step, loss)
    validations: list[Validated] = field(default_factory=list)
    samples: Samples | None = None
    first_samples: Samples | None = None  # those of the base model
    _recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=RECENT))
    _together: int = 1  # steps for each point of `losses`
    _sums: list[float] = field(default_factory=list)  # losses of the next point

    def __post_init__(self) -> None:
        self.pace = Pace(self.clock)

    def update(self, event: Event) -> None:
        self.pace.update(event)
        if isinstance(event, StepDone):
            self.last = event
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
            self._recent.append(event)
            self._draw(event)
        elif isinstance(event, Validated):
            self.validations.append(event)
        elif isinstance(event, Samples):
            if event.step == 0:
                self.first_samples = event
            self.samples = event

    def _draw(self, event: StepDone) -> None:
        self._sums.append(event.loss)
        if len(self._sums) >= self._together:
            self.losses.append((event.step, sum(self._sums) / len(self._sums)))
            self._sums = []
        if len(self.losses) >= CURVE:
            pairs = zip(self.losses[::2], self.losses[1::2], strict=True)
            self.losses = [(x1, (y0 + y1) / 2) for (_, y0), (x1, y1) in pairs]
            self._together *= 2

    @property
    def steps(self) -> int:
        return self.pace.steps

    @property
    def tokens_per_second(self) -> float:
        """Of the examples, padding not counted, over the last steps."""
        return sum(step.useful_tokens for step in self._recent) / max(sum(step.seconds for step in self._recent), 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Of the whole run. None while nothing is known."""
        return self.pace.seconds_left


class PlainScreen:
    """Some of the steps; every validation, checkpoint and change."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._status = Status(clock)
        self._line_at: dict[str, float] = {}  # kind of work -> when its last line was written
        self._any_line_at = clock()
        self._last_step = 0  # that has a line

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: Event) -> None:
        self._status.update(event)
        text = self._line(event)
        if text is not None:
            self._any_line_at = self._status.clock()
            stamp = datetime.now().isoformat(sep=" ", timespec="seconds")
            self._console.print(f"{stamp}  {text}", highlight=False, soft_wrap=True)

    def _line(self, event: Event) -> str | None:
        if isinstance(event, StepDone):
            return self._step(event) if self._due(event) else None
        if isinstance(event, Progress):
            return self._progress(event)
        if isinstance(event, RunStarted):
            self._last_step = event.step
            return f"{'resumed after step ' + str(event.step) if event.resumed else 'started'}: {event.steps} steps"
        if isinstance(event, Validated):
            return _validation_line(event)
        return sentence(event)

    def _due(self, event: StepDone) -> bool:
        first = "step" not in self._line_at
        part = event.step - self._last_step >= self._status.steps / PARTS
        if not (self._pause_over("step") or part or first or event.step == self._status.steps):
            return False
        self._line_at["step"], self._last_step = self._status.clock(), event.step
        return True

    def _step(self, event: StepDone) -> str:
        return (
            f"step {event.step}/{self._status.steps}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  "
            f"lr {event.learning_rate:.2e}  grad norm {event.grad_norm:.3g}  "
            f"{self._status.tokens_per_second:,.0f} tokens/s  memory {amount(event.peak_bytes)}  "
            f"ETA {duration(self._status.seconds_left)}"
        )

    def _progress(self, event: Progress) -> str | None:
        over = self._pause_over(event.what) or self._status.clock() - self._any_line_at >= PAUSE
        if event.done >= event.total:
            del self._line_at[event.what]  # the next event of this name is the first of new work
        elif over:
            self._line_at[event.what] = self._status.clock()
        return f"{event.what} {event.done}/{event.total}" if over else None

    def _pause_over(self, what: str) -> bool:
        now = self._status.clock()
        return now - self._line_at.setdefault(what, now) >= PAUSE


def _validation_line(event: Validated) -> str:
    train = "" if event.train_loss is None else f"train loss {event.train_loss:.4f}  "
    of_tokens = event.perplexity is not None and event.token_accuracy is not None
    tokens = f"  perplexity {event.perplexity:.4g}  token accuracy {event.token_accuracy:.1%}" if of_tokens else ""
    measure = "accuracy" if of_tokens else PREFERENCE
    judged = "" if event.accuracy is None else f"  {measure} {event.accuracy:.1%}"
    return (
        f"validation after step {event.step}  epoch {event.epoch:.2f}  {train}loss {event.loss:.4f}"
        f"{tokens}{judged}{'  (best so far)' if event.best else ''}"
    )


def sentence(event: Event) -> str | None:
    """What either screen says of an event that is neither a step, a validation nor progress; None: nothing."""
    if isinstance(event, Note):
        return event.text
    if isinstance(event, CheckpointSaved):
        return f"checkpoint of step {event.step}: {event.path}"
    if isinstance(event, MemorySplit):
        return f"memory ran out: from now on micro-batches have at most {event.micro_tokens} tokens"
    if isinstance(event, StoppedEarly):
        best = f"the best is {event.best_loss:.4f}, of step {event.best_step}"
        return f"stopped after step {event.step}: the validation loss falls no more, or hardly; {best}"
    if isinstance(event, Finished):
        return f"finished {event.step} steps: best validation loss {event.best_loss:.4f} at step {event.best_step}"
    return None
