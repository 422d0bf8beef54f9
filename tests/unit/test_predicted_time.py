"""What both models are asked beside the held-out rows is predicted by the names that the run's progress then has."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group

from finetune.check.run_analysis import analysing, questions_of
from finetune.commands.plan import answer
from finetune.console import plain_page
from finetune.evaluation import forgetting
from finetune.evaluation.evaluate import evaluate_held_out
from finetune.events import Outlook, Progress, Work, by_part
from finetune.training.extra_evaluations import Beside
from finetune.training.job import Job
from finetune.training.predicted_time import look_ahead
from finetune.training.suite_prompts import ask_suite, read_suite, suite_of
from tests.unit.test_questions import job
from tests.unit.toy_run import result_of

LABELLED = [{"text": f"she saw film {i}", "label": ("bad", "good")[i % 2]} for i in range(12)]
ANSWERED = [{"prompt": f"what's she in {i}?", "completion": f"film {i}"} for i in range(12)]
SETTINGS = {"swaps": "pronouns", "max_tokens": 2}


def job_with(folder: Path, rows: list[dict[str, Any]], cases: int, **evaluate: Any) -> Job:
    """Of so many epochs that everything is asked; with a suite of so many cases."""
    file = folder / "cases.jsonl"
    lines = [{"prompt": f"is it {i}?", "checks": {"longest": 900}} for i in range(cases)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = {"suite": str(file)} if cases else {}
    made = job(folder, rows, train={"epochs": 300, "learning_rate": 1e-3}, evaluate=SETTINGS | named | evaluate)
    return replace(made, suite=result_of(suite_of(made, made.prepared, read_suite(str(file)) if cases else ())))


def predicted_and_done(made: Job) -> tuple[dict[str, float], set[str]]:
    asked, session = questions_of(made), made.open()
    ahead = look_ahead(made, session, asked)
    assert isinstance(ahead, Outlook)
    base = result_of(evaluate_held_out(session, made.recipe, made.prepared, made.tokenizer, "base model"))
    works: list[Work[Any, Any]] = [
        Work(analysing(made, session, asked, base if made.recipe.evaluate.base else None, base))
    ]
    works += [Work(ask_suite(made, made.suite, session))] if made.suite else []
    said = {event.what for work in works for event in work if isinstance(event, Progress)}
    return {name: s for name, s in ahead.seconds.items() if name.startswith(("errors", "suite"))}, said


@pytest.mark.parametrize(
    ("rows", "cases"),
    [
        pytest.param(LABELLED, 3, marks=pytest.mark.slow),
        pytest.param(LABELLED, 0, marks=pytest.mark.slow),
        (ANSWERED, 2),
    ],
)
def test_all_that_is_asked_is_predicted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], cases: int
) -> None:
    monkeypatch.setattr(forgetting, "LONGEST", 12)  # tokens of a piece of general text, of which all are read
    monkeypatch.setattr(forgetting, "ANSWERED", 3)
    predicted, done = predicted_and_done(job_with(tmp_path, rows, cases))
    assert all(seconds > 0 for seconds in predicted.values())
    # A label that is the most probable token of all, or an answer that ends at once, is not asked for.
    at_most = {name for name in predicted if name.endswith(": labels") or "its own answers, " in name}
    assert done <= {*predicted} and {*predicted} - done <= at_most
    assert {*by_part(predicted)} == ({"errors", "suite"} if cases else {"errors"})
    assert any("asked again, time 3" in name for name in done) is (rows is ANSWERED)


def test_what_is_not_asked_takes_no_time(tmp_path: Path) -> None:
    predicted, done = predicted_and_done(job_with(tmp_path, ANSWERED, 2, base=False, forgetting=False, swaps="none"))
    assert {*predicted} == done
    assert done == {*(f"errors: tuned model asked again, time {i}" for i in (1, 2, 3)), "suite: tuned model"}


def test_the_plan_counts_it(tmp_path: Path) -> None:
    made = job_with(tmp_path, LABELLED, 3)
    asked = Beside(questions_of(made), made.suite)
    shown = Group(*answer(made.recipe, made.folder, made.prepared, "reference", aside=asked))
    lines = plain_page(lambda console: console.print(shown)).splitlines()
    (errors,), (suite,) = ([line for line in lines if line.startswith(name)] for name in ("errors ", "suite "))
    assert re.search(r" 12 rows again, \d+ pieces of text  ", errors) and re.search(r" 3 cases  ", suite)
