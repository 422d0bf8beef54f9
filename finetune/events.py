"""Events of a run: frozen values, in order, one way from the run to the screen and the files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

from finetune.errors import Interrupted

Said = TypeVar("Said", bound="Event")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Event:
    """Base of all events; `step` is the number of optimiser steps done."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}  # for lines of metrics.jsonl that are read back

    step: int


@dataclass(frozen=True)
class RunStarted(Event):
    """Training begins, or continues after `step`."""

    steps: int  # in the whole run
    steps_per_epoch: int
    resumed: bool


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser step."""

    epoch: float
    loss: float  # token-weighted mean over the step
    grad_norm: float
    learning_rate: float
    tokens: int  # supervised
    useful_tokens: int  # of the examples, padding not counted
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Validated(Event):
    """One row of the epoch table."""

    epoch: float
    train_loss: float | None  # token-weighted mean over the steps since the last validation; None before training
    loss: float
    perplexity: float | None  # of pairs of answers None, as they are compared whole
    token_accuracy: float | None  # the same
    accuracy: float | None  # of labels or pairs, where there are any
    best: bool
    seconds: float


@dataclass(frozen=True)
class MemorySplit(Event):
    """Memory ran out in a step, which was then repeated with smaller micro-batches."""

    micro_tokens: int  # the new limit


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint of this step is on the disk."""

    path: str


@dataclass(frozen=True)
class StoppedEarly(Event):
    """The validation loss has not improved for as many validations as the recipe allows, or an epoch of `epochs: auto`
    hardly lowered it.
    """

    best_step: int
    best_loss: float


@dataclass(frozen=True)
class Finished(Event):
    """The last step is done."""

    best_step: int
    best_loss: float


@dataclass(frozen=True)
class Passing(Event):
    """Base of the events that matter only when they are said: metrics.jsonl does not record them."""


@dataclass(frozen=True)
class Progress(Passing):
    """How far long work has come that is not a step: evaluating, generating, checking data."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Note(Passing):
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class Outlook(Passing):
    """What lies ahead of a run, said once before its base model is evaluated."""

    title: str  # the model and what computes it
    steps: int
    validations: int  # in the whole run, the one before the first step included
    seconds: Mapping[str, float]  # predicted, in order: "training", and the names of `Progress.what` in the whole run
    chance: float | None = None  # accuracy of a label drawn blindly; None where there are no labels
    majority: float | None = None  # of always the most frequent label, on the validation rows
    memory: float | None = None  # bytes that the device can give; None: not known

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of "base model", "training", "validation" and "tuned model", as far as they are predicted."""
        return by_part(self.seconds)


def by_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Sums for each part of a run: of "base model" what its "loss" and its "labels" take."""
    parts: dict[str, float] = {}
    for what, taken in seconds.items():
        name = what.partition(":")[0]
        parts[name] = parts.get(name, 0.0) + taken
    return parts


@dataclass(frozen=True)
class Sample:
    """One validation row and its present answer."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Samples(Passing):
    """A few validation rows after a validation, the same rows each time."""

    rows: tuple[Sample, ...]


@dataclass(frozen=True)
class CheckpointDue(Passing):
    """A checkpoint of this step is written once the next event is asked for.

    What a resumed run needs beside the checkpoint must be on the disk before that.
    """


class Work(Generic[Said, Result]):
    """Long work, to be iterated over: its events, one by one. After the last, `result` is what the work returned."""

    result: Result

    def __init__(self, events: Generator[Said, None, Result]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[Said]:
        self.result = yield from self._events


def result_of(events: Generator[Said, None, Result]) -> Result:
    """What work returns whose events nobody looks at."""
    work = Work(events)
    for _ in work:
        pass
    return work.result


class Stoppable(Protocol):
    """Whoever may be asked to stop what is under way."""

    @property
    def stopping(self) -> bool: ...


def stoppable(events: Generator[Said, None, Result], by: Stoppable, doing: str) -> Generator[Said, None, Result]:
    """The same events and the same result. Raises Interrupted after an event that brought `by.stopping`."""
    with closing(events):
        work = Work(events)
        for event in work:
            yield event
            if by.stopping:
                raise Interrupted(f"stopped while {doing}")
    return work.result


def checked(events: Generator[Said, None, Result], check: Callable[[], None]) -> Generator[Said, None, Result]:
    """The same events and the same result, with `check` between two of them, and where the work fails.

    What `check` raises then stands for what the work raised, which may have come of it.
    """
    with closing(events):
        work = Work(events)
        try:
            for event in work:
                yield event
                check()
        except Interrupted:
            raise
        except Exception:
            check()
            raise
    return work.result
