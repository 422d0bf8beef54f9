"""What a worker measures of itself, and the job it is given. No framework is imported here."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Task:
    """One measured run, as the parent writes it for the worker."""

    settings: dict[str, Any]  # the contender's own
    model: str
    data: str  # the folder of train.jsonl
    scratch: str  # an empty folder
    batch_size: int
    steps: int  # in the whole run
    blocks: int  # of the model
    layers: int | None  # adapt only so many of the last blocks
    seed: int
    started: float  # time.time() when the process was started
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    longest: int = 2048  # tokens in a row

    @classmethod
    def read(cls) -> Task:
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


@dataclass
class Step:
    """One optimiser step. cpu and wall in seconds; counts in tokens."""

    cpu: float
    wall: float
    loss: float = 0.0
    useful: int = 0  # tokens of the examples, padding not counted
    supervised: int = 0  # positions whose loss is in the step's loss
    padding: int = 0  # those of them that are no token of an example
    positions: int = 0  # tokens that went through the model, padding counted


def cpu_seconds() -> float:
    """Of this process and of those it has waited for (compilers, say)."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_bytes() -> int:
    """The largest resident set since the last `forget_peak`; since the start where that cannot be forgotten."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    if _REFERENCES.exists():
        _REFERENCES.write_text("5")


def mean_loss(rows: Iterable[tuple[float, int]]) -> float:
    """Over all supervised positions, from every row's mean and its number of them."""
    pairs = list(rows)
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


@dataclass
class Meter:
    """begin() before the first step, lap() after every one, end() after the last, write()."""

    task: Task
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outside: float = 0.0  # CPU seconds between begin() and the last step that belong to no step

    def begin(self) -> None:
        self.loading_peak = peak_bytes()
        self.loading_cpu = cpu_seconds()
        forget_peak()
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def mark(self) -> None:
        """A step begins now; what was done since the last one is no part of it."""
        cpu = cpu_seconds()
        self.outside += cpu - self._cpu
        self._cpu, self._wall = cpu, time.perf_counter()

    def lap(self, **counts: Any) -> Step:
        """A step ends now, and the next begins."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        if not self.steps:
            self.first_step = time.time() - self.task.started
            self.first_cpu = cpu
        self.steps.append(Step(cpu - self._cpu, wall - self._wall, **counts))
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return self.steps[-1]

    def end(self) -> None:
        """After the last step; what is done from here on is not measured."""
        self.training_peak, self.whole_cpu = peak_bytes(), cpu_seconds()

    def write(self, **facts: Any) -> None:
        result = {
            "steps": [asdict(step) for step in self.steps],
            "loading_cpu": self.loading_cpu,
            "outside_cpu": self.outside,
            "first_step_seconds": self.first_step,  # wall, from the start of the process
            "first_step_cpu": self.first_cpu,
            "whole_cpu": self.whole_cpu,
            "training_peak": self.training_peak,
            "peak": max(self.training_peak, self.loading_peak),
            "notes": self.notes,
        }
        Path(sys.argv[2]).write_text(json.dumps(result | facts), encoding="utf-8")
