"""What a run has found out is not found out twice: the validation before the first step, and what its data are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from backends.interface import Session
from finetune import run as runs
from finetune.check import run_records
from finetune.disk.metrics import read
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Interrupted
from finetune.events import Validated
from finetune.recipe.load import load_recipe
from finetune.training.job import Job
from tests.end_to_end.command import Work, reviews, same
from tests.unit.toy_run import load_job, run_to_report

LABELLED = "data: {train: train.jsonl, valid: test.jsonl}\ntrain: {epochs: 1, batch_size: 8, learning_rate: 0.01}\n"
ANSWERED = LABELLED.replace("train.jsonl", "asked.jsonl").replace("test.jsonl", "asked-later.jsonl")


class Scored:
    """A job whose session counts the rows that it scores."""

    def __init__(self, job: Job) -> None:
        self.job, self.rows = job, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    def open(self) -> Session:
        session: Any = self.job.open()
        score = session.score

        def counted(batch: Any) -> Any:
            self.rows += len(batch.inputs)
            return score(batch)

        session.score = counted
        return session


def prepared_job(work: Work, *changes: str) -> Scored:
    return Scored(load_job(load_recipe(work.folder / "recipe.yaml", list(changes)), "reference"))


def trained(work: Work, *changes: str) -> tuple[RunFolder, Scored]:
    job = prepared_job(work, *changes)
    run = create(job.recipe, "run")
    run_to_report(job, run)  # type: ignore[arg-type]
    return run, job


def told(run: RunFolder) -> tuple[Any, ...]:
    """All events and the report, but for times, memory and the folder's name."""
    events = [replace(one, **{name: 0 for name in ("seconds", "peak_bytes") if hasattr(one, name)})  # type: ignore[call-arg]
              for one in read(run.metrics)]  # fmt: skip
    report = json.loads(run.report.read_text())
    report["facts"] |= {"seconds": 0, "tokens_per_second": 0, "peak_bytes": 0}
    report["time"] = {}
    report["comparison"] |= {"bag_of_words_seconds": 0}
    report["validations"] = [one | {"seconds": 0.0} for one in report["validations"]]
    return [e if not hasattr(e, "path") else type(e) for e in events], report | {"run": "", "adapter": ""}


@pytest.fixture
def folder(work: Work, monkeypatch: pytest.MonkeyPatch) -> Work:
    asked = [{"prompt": one["text"], "completion": one["label"]} for one in reviews(0, 35)]
    work.lines("asked.jsonl", asked[:26])
    work.lines("asked-later.jsonl", asked[26:])
    monkeypatch.chdir(work.folder)
    return work


@pytest.mark.parametrize("recipe", [LABELLED, ANSWERED], ids=["labels", "answers"])
def test_events_and_report_are_those_of_measuring_twice(
    folder: Work, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    folder.recipe(recipe)
    once, counted = trained(folder)
    monkeypatch.setattr(runs, "known_validation", lambda job, base: None)
    twice, more = trained(folder)
    assert told(once) == told(twice)
    same(once.path, twice.path)
    assert counted.rows <= more.rows - 9, "the nine rows of the validation"
    found = next(one for one in read(once.metrics) if isinstance(one, Validated))
    assert (found.step, found.best, found.accuracy is None) == (0, True, recipe is ANSWERED)


@pytest.mark.parametrize("change", ["data.test=test.jsonl", "evaluate.base=false", "lora.start_from=adapter"])
def test_another_model_or_other_rows_are_measured(folder: Work, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    folder.recipe(LABELLED)
    if "start_from" in change:
        change = f"lora.start_from={trained(folder)[0].adapter}"
    asked: list[Any] = []
    known = runs.known_validation
    monkeypatch.setattr(runs, "known_validation", lambda job, base: asked.append(known(job, base)))
    run, _ = trained(folder, change)
    assert asked == [None] and asdict(next(e for e in read(run.metrics) if isinstance(e, Validated)))["step"] == 0


def test_stopped_before_the_first_step_it_goes_on_to_the_same_end(
    folder: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.recipe(LABELLED)
    whole, _ = trained(folder)
    job = load_job(load_recipe(folder.folder / "recipe.yaml"), "reference")
    run = create(job.recipe, "stopped")
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        run_to_report(job, run, events=seen, stop=lambda event: isinstance(event, Validated))
    assert all(one.step == 0 for one in seen), "it was to be stopped before the first step"
    monkeypatch.setattr(run_records, "survey", lambda *_: pytest.fail("the data are checked already"))
    run_to_report(job, run, resume=True)
    same(run.path, whole.path)
    assert json.loads(run.report.read_text())["check"] == json.loads(whole.report.read_text())["check"]


def test_a_check_that_is_lost_is_made_again(folder: Work) -> None:
    folder.recipe(LABELLED)
    run, _ = trained(folder)
    file = run.path / "check.json"
    before = file.read_bytes()
    file.unlink()
    run_to_report(prepared_job(folder), run, resume=True)  # type: ignore[arg-type]
    assert file.read_bytes() == before
