"""Checkpoints by the clock beside those by steps: when they are written, and that they change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.disk import checkpoint as checkpoints
from finetune.errors import RecipeError
from finetune.events import CheckpointSaved, StepDone
from finetune.training import loop
from finetune.training.loop import Trainer
from tests.unit.toy_run import curve, recipe, trainer


class Clock:
    """What the loop takes for the time; `minutes` pass with every step."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.now = minutes, 1e6

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def pass_over(self, events: Iterator[Any]) -> Iterator[Any]:
        for event in events:
            if isinstance(event, StepDone):
                self.now += 60 * self.minutes
            yield event


def steps_saved(folder: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, **train: Any) -> list[int]:
    clock = Clock(minutes)
    monkeypatch.setattr(loop, "time", clock)
    made = trainer(folder, asked=recipe(train={"checkpoint_every": 100} | train))
    return [event.step for event in clock.pass_over(made.events()) if isinstance(event, CheckpointSaved) and event.step]


@pytest.mark.parametrize(
    ("minutes", "asked", "expected"),
    [
        (1.0, {}, [8]),  # the default is ten minutes, and the run takes eight
        (4.0, {}, [3, 6, 8]),
        (10.0, {}, [1, 2, 3, 4, 5, 6, 7, 8]),
        (9.99, {}, [2, 4, 6, 8]),
        (4.0, {"checkpoint_minutes": "none"}, [8]),
        (4.0, {"checkpoint_minutes": 20.0}, [5, 8]),
        (0.25, {"checkpoint_minutes": 0.5}, [2, 4, 6, 8]),
        (4.0, {"checkpoint_every": 2}, [2, 4, 6, 8]),  # any checkpoint begins the time anew
        (4.0, {"checkpoint_every": 4}, [3, 4, 7, 8]),
    ],
)
def test_a_checkpoint_is_due_by_the_time_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, asked: dict[str, Any], expected: list[int]
) -> None:
    assert steps_saved(tmp_path, monkeypatch, minutes, **asked) == expected


def run_on(made: Trainer, clock: Clock, stop_after: int | None = None) -> list[Any]:
    events = []
    for event in clock.pass_over(made.events()):
        events.append(event)
        if isinstance(event, CheckpointSaved) and event.step == stop_after:
            break
    return events


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_a_run_killed_after_a_timed_checkpoint_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = curve(list(trainer(tmp_path / "whole", asked=recipe(train={"checkpoint_every": 100})).events()))
    clock = Clock(11.0)
    monkeypatch.setattr(loop, "time", clock)
    first = run_on(trainer(tmp_path / "run", asked=recipe(train={"checkpoint_every": 100})), clock, step)
    saved, messages = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    assert (saved is not None and saved.state.step, messages) == (step, [])
    monkeypatch.undo()
    again = trainer(tmp_path / "run", asked=recipe(train={"checkpoint_every": 100, "checkpoint_minutes": "none"}))
    assert saved is not None
    again.restore(saved)
    assert curve(first) + curve(list(again.events())) == whole
    for file in (tmp_path / "whole" / "checkpoints" / "step-00000008").iterdir():
        assert file.read_bytes() == (tmp_path / "run" / "checkpoints" / "step-00000008" / file.name).read_bytes()


@pytest.mark.parametrize("value", [0, -1.0, "never", True, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="checkpoint_minutes"):
        recipe(train={"checkpoint_minutes": value})


def test_ten_minutes_are_the_default_and_whole_numbers_will_do() -> None:
    assert recipe().train.checkpoint_minutes == 10.0
    assert recipe(train={"checkpoint_minutes": 3}).train.checkpoint_minutes == 3.0
