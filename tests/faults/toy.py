"""A toy run on disk, as `train` and `resume` would write it: dropout, accumulation and two epochs, in a second.

As a script it trains in the folder it is given, so that it can be killed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.interface import Session
from finetune.disk import checkpoint as checkpoints
from finetune.disk.metrics import MetricsFile, read
from finetune.events import Event, Passing, Validated
from finetune.training.loop import Trainer
from tests.unit.toy_run import curve, recipe, session, trainer

ACCUMULATING = {"micro_tokens": 40}  # two or three micro-batches a step


def start_or_resume(run: Path, live: Session | None = None, train: dict[str, Any] | None = None) -> Iterator[Event]:
    """The recorded events of a run in that folder, new or resumed; they are written down like a real run's."""
    asked = recipe(train=ACCUMULATING | (train or {}))
    live = live or session(run.parent / "model")
    with MetricsFile(run / "metrics.jsonl") as metrics:
        made: Trainer = trainer(run, live, asked)
        saved, _ = checkpoints.load_newest(made.checkpoints.folder)
        metrics.truncate_after(-1 if saved is None else saved.state.step)
        if saved is not None:
            made.restore(saved)
        for event in made.events():
            metrics.record(event)
            if not isinstance(event, Passing):
                yield event


def run_to_the_end(run: Path, live: Session | None = None, train: dict[str, Any] | None = None) -> Path:
    for _ in start_or_resume(run, live, train):
        pass
    return run


def losses(run: Path) -> list[Any]:
    return curve(read(run / "metrics.jsonl"))


def assert_same_end(run: Path, other: Path) -> None:
    """The same loss curve, validations, weights, moments and state of the loop: to the byte."""
    assert losses(run) == losses(other), "the loss curves differ"
    ours, theirs = (
        [replace(one, seconds=0.0) for one in read(place / "metrics.jsonl") if isinstance(one, Validated)]
        for place in (run, other)
    )
    assert ours == theirs, "the validations differ"
    last = max(path.name for path in (other / "checkpoints").iterdir())
    for file in (other / "checkpoints" / last).iterdir():
        assert file.read_bytes() == (run / "checkpoints" / last / file.name).read_bytes(), f"{last}/{file.name} differs"


if __name__ == "__main__":
    run_to_the_end(Path(sys.argv[1]))
