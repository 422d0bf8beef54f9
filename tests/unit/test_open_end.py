"""`epochs: auto`: when a run ends whose validations say it, how its rate falls, and that it goes on after any stop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.checkpoint import load_newest
from finetune.errors import Interrupted
from finetune.evaluation.evaluate import Evaluation
from finetune.events import CheckpointSaved, EndKnown, Event, Finished, RunStarted, StepDone, StoppedEarly, Validated
from finetune.recipe.schedule import FALLS, MOST_EPOCHS, Plan, known_end, learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.report.screen import Status, sentence
from finetune.training.loop import Trainer
from finetune.training.loop_state import LoopState, has_learned
from tests.unit.toy_run import curve, prepared, recipe, trainer

EPOCH = 4  # steps of toy_run's 13 rows


def auto(**train: Any) -> Recipe:
    changes = {"epochs": "auto", "learning_rate": 0.5, "warmup": 0.0, "checkpoint_every": None}
    return recipe(train=changes | train, evaluate={})


def plan_after(
    losses: list[float], asked: Recipe | None = None, every: int = EPOCH, accuracies: list[float] | None = None
) -> Plan:
    asked = asked or auto()
    judged = accuracies or [None] * len(losses)
    told = [(every * i, loss, judged[i]) for i, loss in enumerate(losses)]
    return known_end(asked, make_plan(asked, 13), told)


@pytest.mark.parametrize(
    ("losses", "epochs", "falls_after"),
    [
        ([9.0], MOST_EPOCHS, 0),
        ([9.0, 5.0, 3.0], MOST_EPOCHS, 0),  # it still falls
        ([9.0, 5.0, 3.0, 3.0], 4, 3),  # the third epoch brought nothing
        ([9.0, 5.0, 3.0, 2.95], 4, 3),  # or too little
        ([9.0, 5.0, 3.0, 2.93], MOST_EPOCHS, 0),
        ([9.0, 9.5], 2, 1),  # no epoch is better than none
        ([9.0, 5.0, 6.0, 4.0], 3, 2),  # what comes after the end was known changes nothing
        ([9.0, *(8.0 / 2**i for i in range(MOST_EPOCHS - 1))], MOST_EPOCHS, 0),
        ([9.0, *(8.0 / 2**i for i in range(MOST_EPOCHS - 2)), 8.0], MOST_EPOCHS, 0),  # zero is an epoch away anyhow
    ],
)
def test_the_run_ends_an_epoch_after_one_that_hardly_lowers_the_loss(
    losses: list[float], epochs: int, falls_after: int
) -> None:
    plan = plan_after(losses)
    assert (plan.steps, plan.falls_after) == (epochs * EPOCH, falls_after * EPOCH)
    assert plan.evaluates_after(plan.steps) and plan.checkpoints_after(plan.steps)


@pytest.mark.parametrize(
    ("losses", "accuracies", "epochs"),
    [
        ([9.0, 5.0, 5.5], [0.5, 0.6, 0.61], MOST_EPOCHS),  # the loss rises, and more answers are right
        ([9.0, 5.0, 5.5, 5.6], [0.5, 0.6, 0.7, 0.7], 4),  # no more than before
        ([9.0, 5.0, 5.5, 5.6], [0.5, 0.7, 0.6, 0.65], 3),  # the second epoch did neither
        ([9.0, 5.0, 4.0, 3.0], [0.5, 0.7, 0.6, 0.5], MOST_EPOCHS),  # fewer are right, and the loss falls
        ([9.0, 5.0, 5.0], [0.5, 0.0, 0.0], 3),  # never one that is right
        ([0.1, 0.01, 0.01], [0.5, 1.0, 1.0], 3),  # no more can be right than all
    ],
)
def test_an_epoch_that_raises_the_accuracy_is_worth_another(
    losses: list[float], accuracies: list[float], epochs: int
) -> None:
    assert plan_after(losses, accuracies=accuracies).steps == epochs * EPOCH


def test_a_constant_rate_ends_with_the_epoch_that_brings_nothing() -> None:
    assert plan_after([9.0, 5.0, 5.0], auto(schedule="constant")).steps == 2 * EPOCH


def test_validations_within_an_epoch_do_not_end_a_run() -> None:
    asked = recipe(train={"epochs": "auto"}, evaluate={"every": 2})
    plan = plan_after([9.0, 5.0, 4.0, 6.0, 3.0], asked, every=2)
    assert plan.steps == MOST_EPOCHS * EPOCH
    assert plan_after([9.0, 5.0, 4.0, 3.0, 4.0], asked, every=2).steps == 3 * EPOCH
    often = make_plan(recipe(train={"epochs": "auto"}, evaluate={"every": 3}), 13)
    assert [step for step in range(1, 9) if often.evaluates_after(step)] == [3, 4, 6, 8]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_from_the_first_epoch_on_and_to_zero_over_the_last_one(schedule: str) -> None:
    asked = auto(schedule=schedule, warmup=0.15)
    plan, longest = plan_after([9.0, 5.0, 5.0], asked), make_plan(asked, 13)
    whole = [learning_rate(asked, longest, step) for step in range(longest.steps)]
    ended = [learning_rate(asked, plan, step) for step in range(plan.steps)]
    assert plan.warmup == 3, "of the five epochs that a run is predicted to have"
    numbered = auto(schedule=schedule, warmup=3 / 24, epochs=MOST_EPOCHS)
    plan_of_number = make_plan(numbered, 13)
    assert whole == [learning_rate(numbered, plan_of_number, step) for step in range(24)], "those of 6 epochs"
    assert ended[8] == whole[8], "without a jump"
    assert all(after < before for before, after in pairwise(ended[8:]))
    assert ended[-1] < whole[8] / 3
    if schedule == "linear":
        assert ended[8:] == pytest.approx([whole[8] * left for left in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_a_number_of_epochs_is_obeyed(epochs: int | None) -> None:
    asked = auto(epochs=epochs)
    plan = make_plan(asked, 13)
    assert plan.steps == (epochs or 3) * EPOCH
    assert known_end(asked, plan, [(0, 9.0, None), (4, 9.0, None), (8, 9.0, None)]) == plan


def state(*validations: tuple[int, float, float | None]) -> LoopState:
    """After validations as (step, loss, accuracy)."""
    made = LoopState(64)
    for step, loss, accuracy in validations:
        better = loss < made.best_loss
        made.validations.append(Validated(step, step / EPOCH, None, loss, None, None, accuracy, better, 0.0))
        if better:
            made.best_step, made.best_loss = step, loss
    return made


def evaluation(loss: float, accuracy: float | None, rows: int = 100) -> Evaluation:
    return Evaluation(rows, rows, loss, None, None, accuracy, None, None, (), None, ())


@pytest.mark.parametrize(
    ("loss", "accuracy", "rows", "kept"),
    [
        (0.09, 0.10, 100, True),  # the lowest loss, whatever else
        (0.20, 0.90, 100, True),  # surer of its errors, and as accurate
        (0.20, 0.88, 100, True),  # 2 of 100 rows fewer: a standard error is 3
        (0.20, 0.86, 100, False),
        (0.20, 0.88, 1000, False),  # of more rows it is less
        (0.20, None, 100, False),  # answers that are not judged have their loss alone
    ],
)
def test_the_end_is_kept_where_it_is_no_less_accurate(
    loss: float, accuracy: float | None, rows: int, kept: bool
) -> None:
    before = state((0, 9.0, 0.5), (4, 0.10, 0.90), (8, 0.15, 0.93))
    assert before.is_better(evaluation(loss, accuracy, rows), ends=True) == kept
    assert before.is_better(evaluation(loss, accuracy, rows)) == (loss < 0.10), "elsewhere the loss decides"


def test_a_run_that_never_beat_the_untrained_model_keeps_that() -> None:
    assert not state((0, 0.1, 0.9), (4, 0.2, 0.9)).is_better(evaluation(0.3, 0.95), ends=True)


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


# Real steps


def toy(folder: Path, asked: Recipe, task: str = "generation") -> Trainer:
    return trainer(folder, asked=asked, rows=prepared(task=task))


def whole(folder: Path, asked: Recipe, task: str = "generation") -> list[Event]:
    return list(toy(folder, asked, task).events())


def of(kind: type[Event], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_run_trains_until_its_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    events = whole(tmp_path, auto(learning_rate=0.15))
    (known,) = of(EndKnown, events)
    losses = [event.loss for event in of(Validated, events)]
    epochs = known.step // EPOCH
    lowered = [after <= min(losses[: i + 1]) * (1 - FALLS) for i, after in enumerate(losses[1:])]
    assert lowered[: epochs - 1] == [True] * (epochs - 1) and not lowered[epochs - 1]
    assert 1 < epochs < MOST_EPOCHS - 1, "the toy should neither stop at once nor go on to the bound"
    assert known.steps == known.step + EPOCH == of(StepDone, events)[-1].step == of(Finished, events)[0].step
    assert of(CheckpointSaved, events)[-1].step == known.steps
    rates, left = [event.learning_rate for event in of(StepDone, events)], 1 - known.step / (MOST_EPOCHS * EPOCH)
    assert rates[: known.step] == pytest.approx([0.15 * (1 - i / (MOST_EPOCHS * EPOCH)) for i in range(known.step)])
    assert rates[known.step :] == pytest.approx([0.15 * left * share for share in (1, 0.75, 0.5, 0.25)])
    status = Status()
    for event in events:
        status.update(event)
    assert status.steps == known.steps
    assert f"falls to zero at step {known.steps}" in (sentence(known) or "")


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


@pytest.mark.parametrize(
    ("epochs", "accuracies", "made"),
    [
        ("auto", [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9], MOST_EPOCHS),  # more are right, though the loss rises
        ("auto", [0.5, 0.6, 0.7, 0.7, 0.9, 0.9, 0.9], 4),  # the third epoch brings nothing, and one follows it
        (MOST_EPOCHS, [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9], 3),  # of a number of epochs the loss alone stops it early
    ],
)
def test_while_the_accuracy_rises_a_run_with_an_open_end_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: Any, accuracies: list[float], made: int
) -> None:
    losses = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]

    def measured(self: Trainer, step: int) -> Any:
        yield from ()
        return evaluation(losses[step // EPOCH], accuracies[step // EPOCH])

    monkeypatch.setattr(Trainer, "_evaluate", measured)
    events = whole(tmp_path, auto(epochs=epochs, learning_rate=0.1, early_stopping=2), "classification")
    assert of(StepDone, events)[-1].step == made * EPOCH


def test_labels_that_are_not_learned_yet_do_not_end_a_run(tmp_path: Path) -> None:
    made = toy(tmp_path, auto(learning_rate=0.1, early_stopping=1), "classification")
    made.majority = 1.0  # nothing beats it
    events = list(made.events())
    told = of(Validated, events)
    assert any(after.loss > before.loss * (1 - FALLS) for before, after in pairwise(told))
    assert of(Finished, events)[0].step == MOST_EPOCHS * EPOCH and not of(EndKnown, events)


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
