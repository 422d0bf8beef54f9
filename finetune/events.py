"""What a run says while it goes on: frozen events, in order. Sinks consume them; nothing flows back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.errors import Interrupted


@dataclass(frozen=True)
class Event:
    """Base of all events; `step` is the number of optimiser steps done."""

    step: int


@dataclass(frozen=True)
class RunStarted(Event):
    steps: int  # in the whole run
    steps_per_epoch: int
    resumed: bool


@dataclass(frozen=True)
class StepDone(Event):
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
    perplexity: float
    token_accuracy: float
    accuracy: float | None  # of labels, where there are labels
    best: bool
    seconds: float


@dataclass(frozen=True)
class Progress(Event):
    """Long work other than a step: evaluating, generating."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class MemorySplit(Event):
    micro_tokens: int  # the new budget


@dataclass(frozen=True)
class CheckpointSaved(Event):
    path: str


@dataclass(frozen=True)
class StoppedEarly(Event):
    best_step: int
    best_loss: float


@dataclass(frozen=True)
class Finished(Event):
    best_step: int
    best_loss: float


Sink = Callable[[Event], None]
Report = Callable[[str, int, int], None]  # what, done, total: how far long work has come


def reporter(what: str, sink: Sink, stop: Callable[[], bool]) -> Report:
    """Progress of an evaluation, to the sink; it raises Interrupted once `stop()` is true."""

    def report(kind: str, done: int, total: int) -> None:
        sink(Progress(0, f"{what}: {kind}", done, total))
        if stop():
            raise Interrupted(f"stopped in the midst of the {what}")

    return report
