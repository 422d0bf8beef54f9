"""search.json: the progress of a search."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder
from finetune.errors import Diverged, Incompatible
from finetune.text import duration

LEDGER = "search.json"
AS_GOOD = 0.01  # of the lowest validation loss: a recipe this near to it is as good
SPARE = 1.1  # times the time that steps took: what the next ones may take
_AGAIN = "begin the search anew"


@dataclass(frozen=True)
class Stage:
    """A trial up to some step."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    trial: int
    steps: int
    loss: float | None  # the lowest of its validations, nats per token; None: it diverged
    seconds: float
    finished: bool


@dataclass
class Ledger:
    """What a search has done: search.json, whole after each stage."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    budget: float  # seconds
    spent: float = 0.0
    base_seconds: float | None = None  # of the base's measurement, and of predicting the winner's
    last_seconds: float | None = None  # that are kept for the winner's own measurement
    others: int | None = None  # trials beside the recipe as it is, once they are planned
    stages: list[Stage] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # trials for which no time was left
    winner: int | None = None

    def write(self, folder: RunFolder) -> None:
        folder.write_json(LEDGER, asdict(self))

    def stage(self, trial: int, steps: int) -> Stage | None:
        """The trial's stage that ended there or later."""
        return next(
            (stage for stage in self.stages if stage.trial == trial and (stage.steps >= steps or stage.finished)), None
        )

    def last(self, trial: int) -> Stage | None:
        stages = [stage for stage in self.stages if stage.trial == trial]
        return stages[-1] if stages else None

    def told(self, settings: str) -> str:
        """The newest stage in a line. settings: its trial's."""
        stage = self.stages[-1]
        loss = "diverged" if stage.loss is None else f"validation loss {stage.loss:.4f}"
        at = f"after its last step, {stage.steps:,}" if stage.finished else f"after {stage.steps:,} steps"
        over = f"{duration(self.spent)} of {duration(self.budget)}"
        return f"trial {stage.trial + 1}, {settings}: {loss} {at}; {over}"

    @property
    def per_step(self) -> float:
        """Seconds of an optimiser step, with what belongs to it: loading, comparing, checkpoints."""
        taken = sum(stage.seconds for stage in self.stages) - (self.base_seconds or 0.0)
        done = {stage.trial: stage.steps for stage in sorted(self.stages, key=lambda stage: stage.steps)}
        return max(taken, 1e-6) / max(sum(done.values()), 1)

    def decide(self) -> None:
        """The winner: the recipe itself where it is as good. Raises Diverged where no trial has a finite loss."""
        ends = {stage.trial: stage.loss for stage in self.stages if stage.finished and stage.loss is not None}
        if not ends:
            raise Diverged("no trial has a finite loss; look at the data, or name a lower train.learning_rate")
        best = min(ends, key=lambda trial: (ends[trial], trial))
        self.winner = 0 if ends.get(0, math.inf) <= ends[best] * (1 + AS_GOOD) else best

    def predicted(self, steps: int) -> float:
        """Seconds of the whole search, were it to end with so many more optimiser steps."""
        return self.spent + SPARE * self.per_step * steps + (self.last_seconds or 0.0)


def read_ledger(folder: Path) -> Ledger:
    """Of a folder that holds a search. Raises Incompatible where there is none, or what no search writes."""
    ledger = read_json(folder / LEDGER, Ledger, _AGAIN)
    if ledger is None:
        raise Incompatible(f"{folder}: without its {LEDGER} nobody knows the search's budget; begin it anew")
    return ledger
