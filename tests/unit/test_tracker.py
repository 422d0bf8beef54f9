"""A tracker gets the figures of steps and validations, and nothing where the recipe asks for none."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.run_folder import RunFolder
from finetune.errors import EnvironmentProblem
from finetune.events import CheckpointSaved, Event, Note, StepDone, Validated
from finetune.report.tracker import tracking
from tests.structure.imports import ROOT

STEP = StepDone(3, 0.5, 1.25, 0.75, 2e-4, 10, 20, 0.1, 1000)
EVENTS: list[Event] = [
    Validated(0, 0.0, None, 2.0, 7.4, 0.25, None, True, 0.1),
    STEP,
    Note(3, "a note"),
    CheckpointSaved(3, "somewhere"),
    Validated(3, 0.5, 1.25, 1.5, 4.5, 0.5, 0.75, True, 0.1),
]


class Fake(types.ModuleType):
    """A package that remembers what it is told."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("trackio")
        self.told: list[tuple[int | None, dict[str, float]]] = []
        self.begun: list[dict[str, Any]] = []
        self.ended = 0
        self.broken = broken

    def init(self, **named: Any) -> None:
        self.begun.append(named)

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        self.told.append((step, figures))
        if self.broken:
            raise RuntimeError("no room")

    def finish(self) -> None:
        self.ended += 1


def run_with(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch, name: Any = "trackio") -> None:
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with tracking(name, RunFolder(folder)) as track:
        for event in EVENTS:
            track(event)


def test_trackio_gets_steps_and_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    run_with(fake, tmp_path, monkeypatch)
    assert [step for step, _ in fake.told] == [0, 3, 3] and fake.ended == 1
    assert fake.begun[0]["name"] == tmp_path.name
    first, second, third = (figures for _, figures in fake.told)
    assert (first["valid/loss"], "valid/accuracy" in first, "valid/train_loss" in first) == (2.0, False, False)
    assert (second["train/loss"], second["train/learning_rate"], "train/step" in second) == (1.25, 2e-4, False)
    assert (third["valid/loss"], third["valid/accuracy"]) == (1.5, 0.75)


def test_none_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    run_with(fake, tmp_path, monkeypatch, "none")
    assert not fake.begun and not fake.told and not list(tmp_path.iterdir())


def test_one_that_fails_is_told_once_and_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(broken=True)
    run_with(fake, tmp_path, monkeypatch)
    assert len(fake.told) == 1 and fake.ended == 1
    assert capsys.readouterr().err.count("trackio gets no more figures (no room)") == 1


def test_one_that_is_not_installed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "tensorboard.summary", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("tensorboard", "trackio"):
        with (
            pytest.raises(EnvironmentProblem, match=f"tracker: {name} is not installed .*pip install {name}"),
            tracking(name, RunFolder(tmp_path)),  # type: ignore[arg-type]
        ):
            pass


def test_an_error_of_the_run_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with pytest.raises(ZeroDivisionError), tracking("trackio", RunFolder(tmp_path)):
        1 / 0  # noqa: B018
    assert fake.ended == 1


def test_tensorboard_writes_what_it_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `trackers` is not installed")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    with tracking("tensorboard", RunFolder(tmp_path)) as track:
        for event in EVENTS:
            track(event)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {
        (value.tag, event.step): value.tensor.float_val[0]
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found["train/loss", 3] == 1.25 and found["valid/loss", 3] == 1.5 and found["valid/loss", 0] == 2.0


def test_the_sink_is_small() -> None:
    assert len((ROOT / "finetune/report/tracker.py").read_text(encoding="utf-8").splitlines()) < 60
