"""`epochs: auto`: a run whose validations say when it ends, and whose steps are averaged; it goes on after any stop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import FloatArray
from finetune.disk.checkpoint import load_newest
from finetune.errors import Interrupted
from finetune.evaluation.evaluate import evaluate
from finetune.events import (
    CheckpointSaved,
    Event,
    Finished,
    RunStarted,
    StepDone,
    StoppedEarly,
    Validated,
    result_of,
)
from finetune.recipe.schedule import FALLS, MOST_EPOCHS, hardly_falls, learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.report.screen import sentence
from finetune.training.average import POWER, SAMPLES, Average
from finetune.training.loop import Trainer
from finetune.training.loop_state import has_learned
from tests.unit.toy_run import curve, prepared, recipe, trainer

EPOCH = 4  # steps of toy_run's 13 rows


def auto(**train: Any) -> Recipe:
    changes = {"epochs": "auto", "learning_rate": 0.5, "warmup": 0.0, "checkpoint_every": None}
    return recipe(train=changes | train, evaluate={})


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([9.0], False),
        ([9.0, 5.0, 3.0], False),  # it still falls
        ([9.0, 5.0, 3.0, 3.0], True),  # the third epoch brought nothing
        ([9.0, 5.0, 3.0, 2.95], True),  # or too little
        ([9.0, 5.0, 3.0, 2.93], False),
        ([9.0, 9.5], True),  # no epoch is better than none
        ([9.0, 5.0, 6.0, 4.0], False),  # the lowest counts
        ([9.0, 5.0, 6.0, 5.0], True),
        ([], False),
    ],
)
def test_a_run_ends_with_an_epoch_that_hardly_lowers_the_loss(losses: list[float], ends: bool) -> None:
    told = [(EPOCH * i, loss) for i, loss in enumerate(losses)]
    assert hardly_falls(make_plan(auto(), 13), told) == ends


def test_validations_within_an_epoch_do_not_end_a_run() -> None:
    plan = make_plan(auto(), 13)
    assert not hardly_falls(plan, [(0, 9.0), (2, 5.0), (4, 4.0), (6, 1.0), (8, 3.0)])
    assert hardly_falls(plan, [(0, 9.0), (2, 5.0), (4, 4.0), (6, 3.0), (8, 4.0)])
    often = make_plan(recipe(train={"epochs": "auto"}, evaluate={"every": 3}), 13)
    assert [step for step in range(1, 9) if often.evaluates_after(step)] == [3, 4, 6, 8]


def rates(asked: Recipe) -> list[float]:
    plan = make_plan(asked, 13)
    return [learning_rate(asked, plan, step) for step in range(plan.steps)]


def test_the_rate_stays_where_the_end_is_not_known() -> None:
    assert rates(auto(warmup=0.15)) == pytest.approx([0.5 / 3, 1.0 / 3] + [0.5] * (MOST_EPOCHS * EPOCH - 2))
    assert rates(auto(epochs=2)) == pytest.approx([0.5 * (8 - step) / 8 for step in range(8)]), "of a number it falls"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_schedule_that_the_recipe_names_is_obeyed(schedule: str) -> None:
    numbered = auto(schedule=schedule, epochs=MOST_EPOCHS)
    assert rates(auto(schedule=schedule)) == rates(numbered), "as over the most epochs that there can be"


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_a_number_of_epochs_is_obeyed(epochs: int | None) -> None:
    asked = auto(epochs=epochs)
    assert make_plan(asked, 13).steps == (epochs or 3) * EPOCH


@pytest.mark.parametrize(
    ("accuracy", "majority", "rows", "learned"),
    [
        (0.54, 0.51, 100, False),  # within a standard error, 5 points
        (0.57, 0.51, 100, True),
        (0.54, 0.51, 1000, True),
        (0.30, 0.02, 200, True),  # of many labels
        (0.87, 0.87, 100, False),  # of spam
        (0.20, 0.51, 100, False),
        (None, None, 100, True),
    ],
)
def test_answers_as_good_as_blind_are_not_learned(
    accuracy: float | None, majority: float | None, rows: int, learned: bool
) -> None:
    told = Validated(4, 1.0, None, 0.3, None, None, accuracy, True, 0.0)
    assert has_learned(told, majority, rows) == learned


# The average


class Numbers:
    """A session that has one number."""

    def __init__(self) -> None:
        self.now = 0.0

    def trained(self) -> dict[str, FloatArray]:
        return {"a": np.array([self.now], np.float32)}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("rows", [13, 200, 640, 1000])
def test_the_average_weighs_late_steps_more(rows: int, method: str) -> None:
    asked = auto()
    plan, numbers = make_plan(asked, rows), Numbers()
    average, every = Average(plan, method), max(plan.steps_per_epoch // SAMPLES[method], 1)
    samples = []
    for step in range(1, plan.steps + 1):
        numbers.now = np.sin(step) + step / plan.steps
        if step % every == 0:
            samples.append(np.float64(np.float32(numbers.now)))
        average.follow(step, numbers)  # type: ignore[arg-type]
    n = np.arange(1, len(samples) + 1)
    weights = np.ones(len(n))
    for p in range(1, POWER + 1):  # n (n + 1) ... (n + POWER - 1): about n ** POWER
        weights *= n + p - 1
    assert average.tensors["a"][0] == pytest.approx(np.average(samples, weights=weights), rel=1e-4)
    assert len(samples) <= MOST_EPOCHS * (2 * SAMPLES[method])


def test_a_run_of_a_number_of_epochs_keeps_what_was_trained_last(tmp_path: Path) -> None:
    made = toy(tmp_path, auto(epochs=2, learning_rate=0.1))
    list(made.events())
    assert not made.average.tensors
    assert not list((tmp_path / "checkpoints").rglob("average.safetensors"))


def test_what_is_validated_and_kept_is_the_average(tmp_path: Path) -> None:
    made = toy(tmp_path, auto(learning_rate=0.15))
    session, by_hand = made.session, Average(make_plan(made.recipe, 13), "lora")
    for event in made.events():
        if isinstance(event, StepDone):
            by_hand.follow(event.step, session)
        if isinstance(event, Validated) and event.step:
            now = session.get_state()
            with by_hand.within(session):
                valid = made.prepared.valid
                found = result_of(evaluate(session, made.prepared, valid, name="x", micro_tokens=64))
            assert event.loss == pytest.approx(found.loss, rel=1e-5)
            after = session.get_state()
            for mine, its in ((now.adapter, after.adapter), (now.moments, after.moments)):
                assert all(mine[name].tobytes() == its[name].tobytes() for name in mine), (
                    "and training goes on as it was"
                )
            if event.best:
                assert made.best
                assert all(made.best[name].tobytes() == by_hand.tensors[name].tobytes() for name in made.best)
                assert any((made.best[name] != now.adapter[name]).any() for name in made.best)


def test_the_average_does_better_than_the_last_step(tmp_path: Path) -> None:
    """At a constant rate that is too high to settle."""
    made = toy(tmp_path, auto(learning_rate=0.6, early_stopping=99))
    last = []
    for event in made.events():
        if isinstance(event, Validated) and event.step:
            valid = made.prepared.valid
            alone = result_of(evaluate(made.session, made.prepared, valid, name="x", micro_tokens=64)).loss
            last.append(alone - event.loss)
    assert np.mean(last) > 0


# Real steps


def toy(folder: Path, asked: Recipe, task: str = "generation") -> Trainer:
    return trainer(folder, asked=asked, rows=prepared(task=task))


def whole(folder: Path, asked: Recipe, task: str = "generation") -> list[Event]:
    return list(toy(folder, asked, task).events())


def of(kind: type[Event], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_run_trains_until_its_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    events = whole(tmp_path, auto(learning_rate=0.15))
    (stopped,) = of(StoppedEarly, events)
    losses = [event.loss for event in of(Validated, events)]
    epochs = stopped.step // EPOCH
    lowered = [after <= min(losses[: i + 1]) * (1 - FALLS) for i, after in enumerate(losses[1:])]
    assert lowered == [True] * (epochs - 1) + [False]
    assert 1 < epochs < MOST_EPOCHS, "the toy should neither stop at once nor go on to the bound"
    assert stopped.step == of(StepDone, events)[-1].step == of(Finished, events)[0].step
    assert of(CheckpointSaved, events)[-1].step == stopped.step
    assert "falls no more, or hardly" in (sentence(stopped) or "")


def test_early_stopping_holds_too(tmp_path: Path) -> None:
    asked = auto(learning_rate=3.0, early_stopping=1)
    events = whole(tmp_path, asked)
    (stopped,) = of(StoppedEarly, events)
    assert of(StepDone, events)[-1].step == stopped.step < MOST_EPOCHS * EPOCH
    again = toy(tmp_path, asked)
    saved, _ = load_newest(tmp_path / "checkpoints")
    assert saved
    again.restore(saved)
    assert [type(event) for event in again.events()] == [RunStarted, Finished]


def test_labels_that_are_not_learned_yet_do_not_end_a_run(tmp_path: Path) -> None:
    made = toy(tmp_path, auto(learning_rate=0.1, early_stopping=1), "classification")
    made.majority = 1.0  # nothing beats it
    events = list(made.events())
    told = of(Validated, events)
    assert any(after.loss > before.loss * (1 - FALLS) for before, after in pairwise(told))
    assert of(Finished, events)[0].step == MOST_EPOCHS * EPOCH


def test_a_run_that_is_stopped_after_any_step_ends_the_same(tmp_path: Path) -> None:
    asked = auto(learning_rate=0.15)
    made = toy(tmp_path / "whole", asked)
    steps = curve(list(made.events()))
    for stop in range(1, len(steps)):
        folder, seen = tmp_path / str(stop), []
        first = toy(folder, asked)
        with pytest.raises(Interrupted):
            for event in first.events():
                seen.append(event)
                first.stopping = first.stopping or (isinstance(event, StepDone) and event.step == stop)
        saved, _ = load_newest(folder / "checkpoints")
        assert saved and saved.state.step == stop
        second = toy(folder, asked)
        second.restore(saved)
        assert curve([*seen, *second.events()]) == steps
        assert second.state.best_loss == made.state.best_loss and second.best and made.best
        assert all(second.best[name].tobytes() == made.best[name].tobytes() for name in made.best)
