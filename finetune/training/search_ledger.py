"""search.json: the progress of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from finetune.disk.run_files import read_json

LEDGER = "search.json"
SPARE = 1.1  # times the time that steps took: what the next ones may take
_AGAIN = "remove it, and the search begins anew"


@dataclass(frozen=True)
class Lap:
    """A trial up to some step."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    trial: int
    steps: int
    loss: float | None  # the lowest of its validations, nats per token; None: it diverged
    seconds: float
    finished: bool


@dataclass
class Ledger:
    """What a search has done: search.json, whole after each lap."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    budget: float  # seconds
    spent: float = 0.0
    base_seconds: float | None = None  # of the base's measurement, and of predicting the winner's
    last_seconds: float | None = None  # that are kept for the winner's own measurement
    others: int | None = None  # trials beside the recipe as it is, once they are planned
    laps: list[Lap] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # trials for which no time was left
    winner: int | None = None

    def lap(self, trial: int, steps: int) -> Lap | None:
        """The trial's lap that ended there or later."""
        return next((lap for lap in self.laps if lap.trial == trial and (lap.steps >= steps or lap.finished)), None)

    def last(self, trial: int) -> Lap | None:
        laps = [lap for lap in self.laps if lap.trial == trial]
        return laps[-1] if laps else None

    @property
    def per_step(self) -> float:
        """Seconds of an optimiser step, with what belongs to it: loading, comparing, checkpoints."""
        taken = sum(lap.seconds for lap in self.laps) - (self.base_seconds or 0.0)
        done = {lap.trial: lap.steps for lap in sorted(self.laps, key=lambda lap: lap.steps)}
        return max(taken, 1e-6) / max(sum(done.values()), 1)

    def predicted(self, steps: int) -> float:
        """Seconds of the whole search, were it to end with so many more optimiser steps."""
        return self.spent + SPARE * self.per_step * steps + (self.last_seconds or 0.0)


def read_ledger(folder: Path) -> Ledger | None:
    """Of a folder that holds a search. Raises Incompatible."""
    return read_json(folder / LEDGER, Ledger, _AGAIN)
