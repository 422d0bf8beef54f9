"""Measure, add data against the worst kind of error, train again: what `compare` says of it, on real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backends import registry
from finetune.disk.run_folder import create
from finetune.recipe.load import check_recipe, load_recipe
from finetune.recipe.locate import demo_recipe
from finetune.report.finished import FinishedRun, read_finished
from finetune.report.iterations import compared
from tests.unit.toy_run import load_job, run_to_report

pytestmark = pytest.mark.slow
REVIEWS = Path(__file__).parents[2] / "finetune" / "assets" / "reviews"


def trained(recipe: dict[str, Any], name: str) -> FinishedRun:
    job = load_job(check_recipe(recipe))
    folder = create(job.recipe, name)
    run_to_report(job, folder)
    return read_finished(folder.path)


def rows(file: Path, of: Path, most: dict[str, int]) -> str:
    """The first rows of each label, at most so many."""
    left, kept = dict(most), []
    for line in of.read_text().splitlines():
        label = json.loads(line)["label"]
        if left.get(label, 0):
            left[label] -= 1
            kept.append(f"{line}\n")
    file.write_text("".join(kept))
    return str(file)


@pytest.mark.parametrize("backend", [name for name in ("mlx", "torch") if not registry.probe(name)][:1])
def test_a_planted_remedy_over_three_iterations_is_named_as_fixed(tmp_path: Path, backend: str) -> None:
    """The first run lacks positive rows; the second has what `compare` advised to add; the third has another rank."""
    demo = load_recipe(demo_recipe()).model_dump(mode="json")
    demo |= {"backend": backend, "output": str(tmp_path / "runs")}
    lacking = rows(tmp_path / "lacking.jsonl", REVIEWS / "train.jsonl", {"negative": 300, "positive": 15})
    whole = rows(tmp_path / "whole.jsonl", REVIEWS / "train.jsonl", {"negative": 300, "positive": 300})
    first = trained(demo | {"data": demo["data"] | {"train": lacking}}, "first")
    second = trained(demo | {"data": demo["data"] | {"train": whole}}, "second")
    assert compared([first, first]).iterations.advice[0].labels == ("positive", "negative")
    third = trained(demo | {"data": demo["data"] | {"train": whole}, "lora": demo["lora"] | {"rank": 12}}, "third")
    found = compared([first, second, third]).iterations
    line = next(line for line in found.kinds if line.labels == ("positive", "negative"))
    print(line, [step.errors.verdict for step in found.steps], [run.value for run in found.runs])
    assert line.shifts[0].verdict == "Fixed" and line.shifts[0].corrected < 0.05
    assert line.shifts[2].verdict == "Fixed"
    assert found.steps[0].errors.verdict == "Better"
