"""What was predicted for each part of a run stands beside what it took, over every process of the run."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible
from finetune.events import Event, Note, Outlook, Progress, StepDone, Validated, Work
from finetune.report.run_times import Times

SECONDS = {"base model: loss": 10.0, "base model: labels": 5.0, "training": 40.0, "validation: loss": 20.0,
           "tuned model: loss": 10.0}  # fmt: skip


def outlook(**changes: float) -> Outlook:
    return Outlook(0, "a model", 10, 3, SECONDS | changes)


def step(number: int) -> StepDone:
    return StepDone(number, 0.1, 1.0, 1.0, 1e-3, 10, 100, 5.0, 0)


def validated(number: int) -> Validated:
    return Validated(number, 0.1, 1.0, 1.0, 2.7, 0.5, None, True, 8.0)


def test_parts_are_sums_of_their_kinds_of_work(tmp_path: Path) -> None:
    times = Times.of(RunFolder(tmp_path), outlook())
    assert times.predicted == {"base model": 15.0, "training": 40.0, "validation": 20.0, "tuned model": 10.0}


def test_the_line_tells_both_and_the_difference() -> None:
    times = Times({"training": 40.0, "validation": 20.0}, {}).of_events([validated(0), step(1), step(2), validated(2)])
    assert times.measured == {"training": 10.0, "validation": 16.0}
    (line,) = times.lines()
    assert line == (
        "time: 26 s, predicted 60 s (-57 %); training 10 s (predicted 40 s), validation 16 s (predicted 20 s)"
    )


def test_a_resumed_run_tells_what_was_predicted_when_it_began(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with (first := Times.of(run, outlook())).measuring("base model", run):
        pass
    again = Times.of(run, outlook(training=1.0))
    assert again == first and again.predicted["training"] == 40.0 and "base model" in again.measured


def test_only_parts_that_have_both_are_compared() -> None:
    times = Times({"base model": 15.0, "training": 40.0}, {"training": 50.0, "elsewhere": 3.0})
    assert times.lines() == ["time: 50 s, predicted 40 s (+25 %); training 50 s (predicted 40 s)"]
    assert Times({}, {"training": 1.0}).lines() == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.9, "+90 %"), (2.0, "2.0 times as long"), (408.0, "more than 100 times as long")]
)
def test_a_large_difference_is_no_percentage(seconds: float, said: str) -> None:
    assert f"({said})" in Times({"training": 1.0}, {"training": seconds}).lines()[0]


def test_times_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    (tmp_path / "time.json").write_text('{"foretold": {"training": 7.0}, "measured": {}}')
    assert Times.of(RunFolder(tmp_path), outlook()).predicted == {"training": 7.0}


@pytest.mark.parametrize("text", ["[]", '{"predicted": 1}', '{"predicted": {"a": "x"}}', "{"])
def test_a_strange_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "time.json").write_text(text)
    with pytest.raises(Incompatible, match=r"time\.json: "):
        Times.of(RunFolder(tmp_path), outlook())


def test_what_failed_is_not_measured(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    times = Times.of(run, outlook())
    with pytest.raises(ZeroDivisionError), times.measuring("base model", run):
        _ = 1 / 0
    assert times.measured == {} and not (tmp_path / "time.json").exists()
    with times.measuring("base model", run):
        pass
    assert json.loads((tmp_path / "time.json").read_text())["measured"].keys() == {"base model"}


def test_what_tells_its_progress_is_measured_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the time that whoever takes the events needs for itself."""
    now = [0.0]
    monkeypatch.setattr("finetune.report.run_times.time.perf_counter", lambda: now[0])

    def working() -> Generator[Event, None, str]:
        for what, seconds in (("references: loss", 2.0), ("references: loss", 3.0), ("", 50.0), ("head: states", 7.0)):
            now[0] += seconds
            yield Progress(0, what, 1, 2) if what else Note(0, "a word")
        return "made"

    times = Times.of(RunFolder(tmp_path), outlook())
    times.measured["head"] = 99.0  # of a process that was killed: done again, it counts once
    work: Work[Event, str] = Work(times.watching(working()))
    for _ in work:
        now[0] += 1000.0
    assert work.result == "made"
    assert times.measured == {"references": 5.0, "head": 7.0}
