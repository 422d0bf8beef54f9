"""A loss above that of guessing is said once, on the screen and in the report, and never for a few odd rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from finetune.disk.run_folder import create
from finetune.evaluation.verdict import IN_A_ROW, Watch, divergence
from finetune.events import Event, Note, StepDone, Validated
from finetune.run import NOT_REPEATABLE
from tests.unit.test_report import model, recipe
from tests.unit.toy_run import Wrapped, load_job, run_to_report

__all__ = ["model", "recipe"]
VOCABULARY = 1000
LOW, HIGH = math.log(VOCABULARY) - 0.01, math.log(VOCABULARY) + 0.01


def step(number: int, loss: float) -> StepDone:
    return StepDone(number, 0.0, loss, 1.0, 1e-3, 10, 10, 0.1, 0)


def validated(number: int, loss: float) -> Validated:
    return Validated(number, 0.0, loss, loss, 1.0, 0.0, None, False, 0.1)


@pytest.mark.parametrize(
    ("events", "said_at"),
    [
        ([step(n, LOW) for n in range(1, 30)], None),
        ([step(n, HIGH) for n in range(1, 6)], None),  # warmup
        ([step(n, HIGH) for n in range(1, 30)], 5 + IN_A_ROW),
        ([step(n, (LOW, HIGH)[n % 2]) for n in range(1, 30)], None),
        ([step(n, (LOW, HIGH, HIGH)[n % 3]) for n in range(1, 30)], None),
        ([validated(0, HIGH), validated(5, HIGH), validated(10, LOW)], None),  # before and during the warmup
        ([validated(5, HIGH), step(6, LOW), validated(6, HIGH)], 6),
    ],
)
def test_when_it_is_said(events: list[Event], said_at: int | None) -> None:
    watch = Watch(VOCABULARY, warmup=5)
    said = [(event.step, text) for event in events if (text := watch.look(event))]
    assert [number for number, _ in said] == ([] if said_at is None else [said_at])
    assert divergence(events, VOCABULARY, 5) == (said[0][1] if said else None)
    assert all(f"After step {said_at} " in text and "guessing would have 6.91" in text for _, text in said)


def curve(*losses: float) -> list[Event]:
    """A validation before training, a step for each loss, and a validation at the end."""
    steps = [step(n, loss) for n, loss in enumerate(losses, 1)]
    return [validated(0, losses[0]), *steps, validated(len(losses), losses[-1])]


@pytest.mark.parametrize(
    ("losses", "words", "remedy"),
    [
        ([2.0, 5.0, 9.0, 12.0, 12.0, 12.0], "Diverging?", "Lower train.learning_rate"),
        ([8.0, 9.5, 11.0, 12.0, 13.0, 14.0], "Diverging?", "Lower train.learning_rate"),  # high before, and rises
        ([9.0, 8.99, 9.05, 8.98, 8.97, 8.96], "High loss", "raise train.learning_rate"),  # hardly moves
        ([12.0, 11.0, 10.0, 9.5, 9.2, 9.0], "High loss", "It fell from 12.00"),  # falls, not far enough
        ([9.0, 9.0, 9.0, 9.0, 14.0, 15.0, 16.0], "Diverging?", "Lower train.learning_rate"),  # after the other notice
        ([12.0, 10.0, 9.0, 8.0, 6.0, 4.0], None, ""),
    ],
)
def test_a_loss_that_rises_is_told_from_one_that_falls_too_slowly(
    losses: list[float], words: str | None, remedy: str
) -> None:
    said = divergence(curve(*losses), VOCABULARY, 0)
    assert (said is None) == (words is None)
    assert said is None or (said.startswith(str(words)) and remedy in said)
    assert said is None or ("Lower train.learning_rate" in said) == (words == "Diverging?")


def test_without_a_vocabulary_nothing_is_said() -> None:
    assert divergence([step(n, 1e9) for n in range(9)], None, 0) is None


def test_a_run_above_guessing_says_so_on_the_screen_and_in_the_report(recipe, monkeypatch) -> None:
    class Worse(Wrapped):
        def step(self, *given: Any) -> Any:
            found = self.inner.step(*given)
            return replace(found, loss=found.loss + 20)

    job = load_job(recipe)
    assert job.folder.vocabulary == 320
    opened = job.open
    monkeypatch.setattr(type(job), "open", lambda self: Worse(opened()))
    run, events = create(job.recipe, "worse"), []
    report = run_to_report(job, run, events=events)
    notices = [event.text for event in events if isinstance(event, Note) and event.text.startswith("Diverging?")]
    assert notices == [report.divergence]
    assert notices[0] in " ".join((run.path / "report.txt").read_text().split())


def test_a_run_that_cannot_be_repeated_says_so_once_and_in_environment_json(recipe, monkeypatch) -> None:
    class Unlucky(Wrapped):
        repeatable = True

        def step(self, *given: Any) -> Any:
            self.repeatable = False
            return self.inner.step(*given)

    job = load_job(recipe)
    opened = job.open
    monkeypatch.setattr(type(job), "open", lambda self: Unlucky(opened()))
    run, events = create(job.recipe, "unlucky"), []
    run_to_report(job, run, events=events)
    assert [event.text for event in events if isinstance(event, Note)].count(NOT_REPEATABLE) == 1
    assert json.loads((run.path / "environment.json").read_text())["repeatable"] is False
