"""Whole runs that learn from pairs of answers: what is measured of them, and how they go on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.check.retrain import without_rows
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import ExitCode
from finetune.events import Event, StepDone
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune, trained
from tests.unit.toy_run import load_job, result_of, run_to_report, run_until_killed

PAIRED = RECIPE.replace("lora: {rank: 2, alpha: 4}", "lora: {rank: 2, alpha: 4}\npreferences: {}").replace(
    "steps: 3", "steps: 6, learning_rate: 0.02"
)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i}?", "chosen": f"a fine film {i}", "rejected": "a dull cold film"}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with one finished run, `run`."""
    work = Work.of_one_block(tmp_path_factory)
    work.lines("rows.jsonl", rows(12))
    work.lines("valid.jsonl", rows(7, 100))
    return trained(work, PAIRED)


def test_a_run_measures_pairs_before_and_after(made: Work) -> None:
    report = json.loads((made.folder / "run" / "report.json").read_text())
    assert report["base"]["loss"] == pytest.approx(np.log(2), abs=1e-6) and report["base"]["pairs"]["margin"] == 0
    assert report["tuned"]["loss"] < report["base"]["loss"] and report["tuned"]["pairs"]["margin"] > 0
    assert report["tuned"]["pairs"]["rewarded"] > 0.5 and report["tuned"]["interval"] is not None
    assert report["validations"][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    said = (made.folder / "run" / "report.txt").read_text()
    assert re.search(r"preference accuracy +\d", said) and "loss, nats/pair" in said
    for name in ("run/report.txt", "run/report.html", "screen.txt"):
        page = (made.folder / name).read_text()
        assert "perpl" not in page and "token acc" not in page and "exact match" not in page
        assert "preference accuracy" in page
    assert "train valid. prefer. epoch loss loss acc." in " ".join(said.split())


def test_commands_take_a_run_of_pairs(made: Work) -> None:
    run = json.loads((made.folder / "run" / "report.json").read_text())
    finetune(made, "eval", "run").good()
    again = json.loads((made.folder / "run" / "eval.json").read_text())
    for model in ("base", "tuned"):
        assert again[model]["accuracy"] == run[model]["accuracy"]
        assert again[model]["pairs"]["margin"] == pytest.approx(run[model]["pairs"]["margin"], abs=1e-5)
    finetune(made, "generate", "run", "what is 5?", "--max-tokens", "3").good()
    assert "pairs of unequal length" in finetune(made, "check", "recipe.yaml").good().out
    assert "preferences" in finetune(made, "plan", "recipe.yaml").good().out
    finetune(made, "init", "rows.jsonl", "--output", "begun.yaml", "--model", "model").good()
    started = load_recipe(made.folder / "begun.yaml", ["backend=reference", "quantize=none"])
    assert started.preferences is not None and started.lora.dropout == 0
    assert len(load_job(started).prepared.train.examples) + len(load_job(started).prepared.valid.examples) == 12


@pytest.mark.parametrize(
    ("key", "said"),
    [("lora.dropout=0.1", "without chance"), ("task=generation", "remove it"), ("head={}", "no label"),
     ("evaluate.swaps=pronouns", "not asked again")],
)  # fmt: skip
def test_recipes_that_pairs_do_not_fit_are_refused(made: Work, key: str, said: str) -> None:
    answer = finetune(made, "train", "recipe.yaml", key)
    assert answer.code == ExitCode.RECIPE and said in answer.err


@pytest.fixture(scope="module")
def by_odds(made: Work) -> Work:
    """With one more finished run, `odds`, by ORPO."""
    finetune(made, "train", "recipe.yaml", "output=by-odds", "preferences.loss=orpo").good()
    next((made.folder / "by-odds").glob("recipe-*")).rename(made.folder / "odds")
    return made


def test_a_run_by_odds_asks_no_other_model(by_odds: Work) -> None:
    run = by_odds.folder / "odds"
    report = json.loads((run / "report.json").read_text())
    assert not (run / "references.json").exists() and "references" not in (run / "metrics.jsonl").read_text()
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert report["tuned"]["pairs"]["margin"] > report["base"]["pairs"]["margin"]
    assert report["tuned"]["pairs"]["rewarded"] == report["tuned"]["accuracy"]  # the odds rise with the mean
    finetune(by_odds, "eval", "odds").good()
    assert json.loads((run / "eval.json").read_text())["tuned"]["loss"] == pytest.approx(report["tuned"]["loss"])


@pytest.mark.parametrize(("loss", "after"), [("dpo", None), ("dpo", 1), ("dpo", 4), ("orpo", 1), ("orpo", 4)])
def test_a_run_of_pairs_that_goes_on_ends_with_the_same_bytes(
    by_odds: Work, loss: str, after: int | None, tmp_path: Path
) -> None:
    """after: the step it was stopped after; None: while the pairs were scored."""
    job = load_job(load_recipe(by_odds.folder / "recipe.yaml", [f"output={tmp_path}", f"preferences.loss={loss}"]))
    run, whole = create(job.recipe, "stopped"), by_odds.folder / {"dpo": "run", "orpo": "odds"}[loss]
    with pytest.raises(Exception, match="stopped"):
        run_to_report(job, run, stop=lambda event: _is_due(event, after))
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    referred_to = ["references.json"] * (loss == "dpo")
    for name in (*referred_to, "adapter/adapter_model.safetensors", "evaluation-tuned.json"):
        assert (run.path / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(("loss", "whole"), [("dpo", "run"), ("orpo", "odds")])
def test_a_killed_run_of_pairs_ends_with_the_same_bytes(by_odds: Work, loss: str, whole: str, tmp_path: Path) -> None:
    job = load_job(load_recipe(by_odds.folder / "recipe.yaml", [f"output={tmp_path}", f"preferences.loss={loss}"]))
    run = create(job.recipe, "killed")
    run_until_killed(job, run, 5)
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (by_odds.folder / whole / name).read_bytes()


def test_a_run_with_dora_measures_the_base_and_goes_on(by_odds: Work, tmp_path: Path) -> None:
    """Without its adapter the model is the base again, magnitudes too: DPO's loss of it is ln 2, also at the end."""
    whole, again = by_odds.folder / "lengths", tmp_path / "runs"
    finetune(by_odds, "train", "recipe.yaml", f"output={tmp_path}", "lora.dora=true").good()
    next(tmp_path.glob("recipe-*")).rename(whole)
    report = json.loads((whole / "report.json").read_text())
    assert report["base"]["loss"] == pytest.approx(np.log(2), abs=1e-6) and report["tuned"]["loss"] < 0.69
    job = load_job(load_recipe(by_odds.folder / "recipe.yaml", [f"output={again}", "lora.dora=true"]))
    run = create(job.recipe, "killed")
    run_until_killed(job, run, 5)
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapters.safetensors", "evaluation-base.json"):
        assert (run.path / name).read_bytes() == (whole / name).read_bytes(), name


def _is_due(event: Event, after: int | None) -> bool:
    if after is None:
        return getattr(event, "what", "") == "references: loss"
    return isinstance(event, StepDone) and event.step == after


def test_a_prompt_that_is_shortened_for_one_answer_alone_leaves_the_pair_out(made: Work, tmp_path: Path) -> None:
    long = [*rows(3), {"prompt": "what is this? " * 20, "chosen": "a film", "rejected": "a fine warm film " * 5}]
    made.lines("long.jsonl", long)
    settings = ["data.train=" + str(made.folder / "long.jsonl"), "train.max_length=48", "data.max_dropped=0.5"]
    job = load_job(load_recipe(made.folder / "recipe.yaml", [*settings, "train.batch_size=2"]))
    assert len(job.prepared.train.examples) == 3
    assert "raise train.max_length" in job.prepared.train.dropped[-1][1]
    assert all(replace(one, rejected=None) and one.rejected for one in job.prepared.train.examples)


def test_a_model_of_all_rows_but_none_is_the_run_s_own(made: Work) -> None:
    """Its pairs have the references of the model without its adapter: without them its margins would be others."""
    job = load_job(load_recipe(made.folder / "recipe.yaml"))
    again = result_of(without_rows(job, job.open(), RunFolder(made.folder / "run"), (), 60.0))
    run = json.loads((made.folder / "run" / "report.json").read_text())["tuned"]
    assert (again.loss, again.pairs.margin) == pytest.approx((run["loss"], run["pairs"]["margin"]), abs=1e-6)
