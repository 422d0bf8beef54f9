"""`runs`: every run of a folder in one line, the newest first, whatever state it is in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.lock import locked
from finetune.disk.run_list import RunLine, overview
from finetune.recipe.load import check_recipe, dump_recipe
from tests.unit.test_startup import FRAMEWORKS, SCIENCE, loaded, packages

RECIPE = dump_recipe(
    check_recipe({"model": {"path": "Qwen/Qwen3-0.6B"}, "data": {"train": "/data/my reviews: new.csv"}})
)
REPORT = {
    "base": {"loss": 2.0, "accuracy": 0.5, "labels": ["a", "b"], "more": 1},
    "tuned": {"loss": 1.0, "accuracy": 0.845, "labels": ["a", "b"]},
    "comparison": {"verdict": "Better: accuracy 0.500 before", "fixed": 3},
    "run": "x",
}


def made(folder: Path, name: str, report: Any = None, checkpoints: tuple[int, ...] = (), recipe: str = RECIPE) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe)
    for step in checkpoints:
        (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    if report is not None:
        (run / "report.json").write_text(json.dumps(report))
    return run


def line(folder: Path) -> RunLine:
    (found,) = overview(folder)
    return found


def test_a_finished_run_says_what_it_gained(tmp_path: Path) -> None:
    made(tmp_path, "one-20260131-093000", REPORT)
    found = line(tmp_path)
    assert (found.state, found.model, found.data) == ("finished", "Qwen/Qwen3-0.6B", "my reviews: new.csv")
    assert (found.figure, found.verdict) == ("accuracy 50.0% -> 84.5%", "Better")
    assert f"{found.began:%Y-%m-%d %H:%M:%S}" == "2026-01-31 09:30:00"
    assert line(tmp_path / "one-20260131-093000") == found, "the folder of a run is that run"


def other(**changes: Any) -> dict[str, Any]:
    return {**REPORT, **changes}


OPEN = {"loss": 1.5, "accuracy": 0.0, "labels": []}


@pytest.mark.parametrize(
    ("report", "figure"),
    [
        (other(base=None, comparison=None), "accuracy 84.5%"),
        (other(base=OPEN, tuned={**OPEN, "accuracy": 0.25}), "exact match 0.0% -> 25.0%"),
        (other(base=OPEN, tuned={**OPEN, "accuracy": 0.25, "compared": "json"}), "same JSON 0.0% -> 25.0%"),
        (other(base=None, tuned={**OPEN, "accuracy": 1, "compared": "last_number"}), "same last number 100.0%"),
        (other(base=None, tuned={**OPEN, "accuracy": 1, "compared": "first_line"}), "same first line 100.0%"),
        (other(base=OPEN, tuned={**OPEN, "loss": 0.5}), "loss 1.5000 -> 0.5000"),
        (other(base=None, tuned={**OPEN, "accuracy": None}), "loss 1.5000"),
    ],
)
def test_the_figure_is_the_one_that_tells_most(tmp_path: Path, report: dict[str, Any], figure: str) -> None:
    made(tmp_path, "one", report)
    assert line(tmp_path).figure == figure


def test_one_that_was_stopped_says_where(tmp_path: Path) -> None:
    made(tmp_path, "one", checkpoints=(3, 12))
    assert line(tmp_path).state == "stopped at step 12"
    made(tmp_path / "others", "two")
    assert line(tmp_path / "others").state == "stopped before step 1"


def test_one_that_runs_says_so_and_is_not_disturbed(tmp_path: Path) -> None:
    run = made(tmp_path, "one", checkpoints=(3,))
    with locked(run, os.getpid()) as lock:
        assert line(tmp_path).state == "running"
        lock.check()
    assert line(tmp_path).state == "stopped at step 3"
    (run / ".lock").write_text("of one that was killed")
    assert line(tmp_path).state == "stopped at step 3"


def a_pipe(run: Path) -> None:
    (run / "report.json").unlink()
    os.mkfifo(run / "report.json")


def written(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_bytes(data)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (written("report.json", b"{"), "report.json"),
        (written("report.json", b'{"tuned": []}'), "report.json"),
        (written("report.json", b"\xff\xfe"), "report.json"),
        (a_pipe, "report.json"),
        (written("recipe.yaml", b""), "recipe.yaml"),
        (written("recipe.yaml", b"model: {path: [\n"), "recipe.yaml"),
        (written("recipe.yaml", b"\xff"), "recipe.yaml"),
        (written("recipe.yaml", b"model: *x\n"), "recipe.yaml"),
        (lambda run: (run / "recipe.yaml").rename(run / "identity.json"), "recipe.yaml: missing"),
    ],
)
def test_a_damaged_one_is_listed_beside_the_others(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    made(tmp_path, "good-20260102-000000", REPORT)
    damage(made(tmp_path, "bad-20260101-000000", REPORT))
    good, bad = overview(tmp_path)
    assert (good.state, good.path.name) == ("finished", "good-20260102-000000")
    assert bad.state.startswith("damaged: ") and words in bad.state


def test_what_is_no_run_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert overview(tmp_path) == []


def test_a_recipe_with_odd_sections_is_read(tmp_path: Path) -> None:
    made(
        tmp_path, "one", REPORT, recipe="data:\n  train: a.csv\n\n# more\n  test: b\nmodel: {path: m}\nprompt: |\n  x\n"
    )
    assert (line(tmp_path).model, line(tmp_path).data) == ("m", "a.csv")


def test_a_hundred_take_less_than_a_second(tmp_path: Path) -> None:
    for number in range(100):
        made(tmp_path, f"run-20260101-{number:06}", REPORT)
    begun = time.process_time()
    found = overview(tmp_path)
    assert time.process_time() - begun < 1
    assert [one.path.name for one in found] == sorted((one.path.name for one in found), reverse=True)
    assert len(found) == 100


def test_the_command_loads_no_framework(tmp_path: Path) -> None:
    made(tmp_path / "runs", "one-20260131-093000", REPORT)
    assert not packages(loaded(tmp_path, "runs", code=0)) & (FRAMEWORKS | (SCIENCE - {"numpy"}))
    assert loaded(tmp_path, "runs", "nowhere", code=8)
