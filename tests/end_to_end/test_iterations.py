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
from finetune.report.finished_run import FinishedRun, read_finished
from finetune.report.iterations import compared
from tests.unit.toy_run import load_job, run_to_report

pytestmark = pytest.mark.slow
REVIEWS = Path(__file__).parents[2] / "finetune" / "assets" / "reviews"
LACKING, WHOLE = {"negative": 150, "positive": 8}, {"negative": 150, "positive": 150}


def trained(recipe: dict[str, Any], name: str, rank: int = 8) -> FinishedRun:
    job = load_job(check_recipe(recipe | {"lora": recipe["lora"] | {"rank": rank}}))
    folder = create(job.recipe, name)
    run_to_report(job, folder)
    return read_finished(folder.path)


def rows(file: Path, of: str, most: dict[str, int]) -> str:
    """The first rows of each label, at most so many."""
    left, kept = dict(most), []
    for line in (REVIEWS / of).read_text(encoding="utf-8").splitlines():
        label = json.loads(line)["label"]
        if left.get(label, 0):
            left[label] -= 1
            kept.append(f"{line}\n")
    file.write_text("".join(kept), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("backend", [name for name in ("torch", "mlx") if not registry.probe(name)][:1])
def test_a_planted_remedy_over_three_iterations_is_named_as_fixed(tmp_path: Path, backend: str) -> None:
    """The first run lacks positive rows; the second has what `compare` advised to add; the third has another rank.

    Shorter than the demo, whose own 600 rows and 4 epochs give 17 such errors for 100 in place of what stands below.
    """
    demo = load_recipe(demo_recipe()).model_dump(mode="json")
    demo |= {"backend": backend, "output": str(tmp_path / "runs")}
    demo["train"] |= {"epochs": 2, "batch_size": 4}
    demo["evaluate"] |= {"base": False, "forgetting": False}
    valid = rows(tmp_path / "valid.jsonl", "valid.jsonl", {"negative": 20, "positive": 20})

    def data(name: str, most: dict[str, int]) -> dict[str, Any]:
        return {"data": demo["data"] | {"train": rows(tmp_path / name, "train.jsonl", most), "valid": valid}}

    first = trained(demo | data("lacking.jsonl", LACKING), "first")
    assert compared([first, first]).iterations.advice[0].labels == ("positive", "negative")
    second = trained(demo | data("whole.jsonl", WHOLE), "second")
    third = trained(demo | data("whole.jsonl", WHOLE), "third", rank=12)
    found = compared([first, second, third])
    line = next(line for line in found.iterations.kinds if line.labels == ("positive", "negative"))
    print(line, [step.errors.verdict for step in found.iterations.steps], found.sentence)
    assert line.shifts[0].verdict == "Fixed" and line.shifts[0].corrected < 0.05
    assert line.shifts[2].verdict == "Fixed" and line.shifts[2].corrected < 0.05
    assert found.iterations.steps[0].errors.verdict == "Better" and found.sentence.startswith("Better: ")
