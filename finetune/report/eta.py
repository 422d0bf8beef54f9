"""Progress and remaining time of a whole run: base model, steps, validations, tuned model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune.events import Event, Outlook, Progress, RunStarted, Samples, StepDone, StoppedEarly, Validated

FROZEN, REFERENCES, HEAD, BASE, RACE = "frozen blocks", "references", "head", "base model", "race of learning rates"
TRAINING, VALIDATION, TUNED = "training", "validation", "tuned model"
ERRORS, SUITE = "errors", "suite"  # what both models are asked beside the held-out rows
BEFORE, AFTER = (FROZEN, REFERENCES, HEAD, BASE, RACE), (TUNED, ERRORS, SUITE)  # training
PHASES = (*BEFORE, TRAINING, VALIDATION, *AFTER)  # in their order, but that validations lie within training
_ORDER = {name: i for i, name in enumerate(PHASES)} | {VALIDATION: len(BEFORE)}
RECENT = 20  # steps whose time those to come are taken to need


@dataclass
class _Work:
    """The work in hand that is not a step."""

    what: str  # as `Progress.what`
    began: float  # seconds
    share: float = 0.0  # done


@dataclass
class Pace:
    """Give it every event in order. What was measured counts before what was predicted."""

    clock: Callable[[], float] = time.monotonic  # seconds
    phase: str = ""  # of PHASES; before the first, what the work is called
    done: int = 0  # rows or steps of the phase
    total: int = 0
    steps: int = 0  # in the whole run
    step: int = 0
    validations: int = 0  # made
    outlook: Outlook | None = None
    _measured: dict[str, float] = field(default_factory=dict)  # Progress.what -> seconds, of the last time
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # seconds of steps
    _validations: list[float] = field(default_factory=list)  # seconds of those that this process made
    _work: _Work | None = None
    _stopped: bool = False  # early: no step follows

    def __post_init__(self) -> None:
        self._began = self._last = self.clock()

    def update(self, event: Event) -> None:
        self._take(event)
        self._last = self.clock()

    def _take(self, event: Event) -> None:
        if isinstance(event, Outlook):
            self.outlook, self.steps = event, event.steps
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, RunStarted):
            self.steps = event.steps
            self._train(event.step)
        elif isinstance(event, StepDone):
            self._recent.append(event.seconds)
            self._train(event.step)
        elif isinstance(event, Validated):
            self.validations += 1
            if self._work and self._work.what.startswith(VALIDATION):
                self._validations.append(event.seconds)
                self._train(event.step)
        elif isinstance(event, Samples):
            self._train(event.step)
        elif isinstance(event, StoppedEarly):
            self._stopped = True

    def _train(self, step: int) -> None:
        self._work = None
        self.step = max(self.step, step)
        self.phase, self.done, self.total = TRAINING, self.step, self.steps

    def _progress(self, event: Progress) -> None:
        if self._work is None or self._work.what != event.what:
            self._work = _Work(event.what, self._last)  # its first batch is over already
        self._work.share = event.done / max(event.total, 1)
        name = event.what.partition(":")[0]
        if name in PHASES or self.phase not in PHASES:
            self.phase = name
        self.done, self.total = event.done, event.total
        if event.done >= event.total:
            self._measured[event.what] = self.clock() - self._work.began

    @property
    def working_on(self) -> str:
        """The work in hand, as `Progress.what`; empty during steps."""
        return self._work.what if self._work else ""

    @property
    def elapsed(self) -> float:
        return self.clock() - self._began

    @property
    def share(self) -> float | None:
        """Of the run's time, what is over. None where the rest is not known."""
        left = self.seconds_left
        return None if left is None else self.elapsed / max(self.elapsed + left, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Of the whole run; None while nothing is known."""
        if not (self.outlook and self.outlook.seconds) and not self._recent:
            return None
        return sum(map(self._left, BEFORE)) + self._training_left() + sum(map(self._left, AFTER))

    def is_over(self, phase: str) -> bool:
        return _ORDER[phase] < _ORDER.get(self.phase, 0)

    def _training_left(self) -> float:
        if self.phase in AFTER:
            return 0.0
        steps = 0 if self._stopped else self.steps - self.step
        left = steps * self._step_seconds()
        planned = self.outlook.validations if self.outlook else self.validations
        to_come = 0 if self._stopped else max(planned - self.validations, 0)
        begun = self._work.share if self._work and self._work.what.startswith(VALIDATION) else 0.0
        return left + max(to_come - begun, 0.0) * self._validation_seconds()

    def _step_seconds(self) -> float:
        times = list(self._recent)
        if times:
            return sum(times[len(times) > 2 :]) / len(times[len(times) > 2 :])  # the first step chooses kernels
        return self._predicted(TRAINING) * self._slower() / max(self.steps, 1)

    def _validation_seconds(self) -> float:
        if times := self._validations[-3:]:
            return sum(times) / len(times)
        planned = max(self.outlook.validations, 1) if self.outlook else 1
        return self._predicted(VALIDATION) * self._slower() / planned

    def _left(self, phase: str) -> float:
        """Of what is not training; what the base and what the tuned model does are alike."""
        if self.outlook is None or self.is_over(phase) or (phase in BEFORE and self.validations):
            return 0.0
        left = 0.0
        for what, seconds in self.outlook.seconds.items():
            if what.partition(":")[0] == phase and what not in self._measured:
                alike = self._measured.get(what.replace(TUNED, BASE))
                expected = seconds * self._slower() if alike is None else alike
                left += self._left_of(what, expected)
        return left

    def _left_of(self, what: str, expected: float) -> float:
        work = self._work
        if work is None or work.what != what:
            return expected
        if work.share > 0:  # the more is done, the more its own pace counts; the longest rows come first
            spent = self._last - work.began
            expected = spent + (1 - work.share) * expected
        return max((1 - work.share) * expected - (self.clock() - self._last), 0.0)

    def _predicted(self, phase: str) -> float:
        return self.outlook.parts.get(phase, 0.0) if self.outlook else 0.0

    def _slower(self) -> float:
        """How many times as long as predicted the evaluations took that are over; of validations, only some are."""
        predicted = self.outlook.seconds if self.outlook else {}
        known = [what for what in predicted if what in self._measured and not what.startswith(VALIDATION)]
        expected = sum(predicted[what] for what in known)
        return sum(self._measured[what] for what in known) / expected if expected > 0 else 1.0
