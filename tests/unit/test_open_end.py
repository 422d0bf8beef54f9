"""`epochs: auto`: when a run ends whose validations say it, how its rate falls, and that it goes on after any stop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.checkpoint import load_newest
from finetune.errors import Interrupted
from finetune.events import CheckpointSaved, EndKnown, Event, Finished, RunStarted, StepDone, StoppedEarly, Validated
from finetune.recipe.schedule import FALLS, MOST_EPOCHS, Plan, known_end, learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.report.screen import Status, sentence
from tests.unit.toy_run import curve, recipe, trainer

EPOCH = 4  # steps of toy_run's 13 rows


def auto(**train: Any) -> Recipe:
    changes = {"epochs": "auto", "learning_rate": 0.5, "warmup": 0.0, "checkpoint_every": None}
    return recipe(train=changes | train, evaluate={})


def plan_after(losses: list[float], asked: Recipe | None = None, every: int = EPOCH) -> Plan:
    asked = asked or auto()
    plan = make_plan(asked, 13)
    return known_end(asked, plan, [(every * i, loss) for i, loss in enumerate(losses)])


@pytest.mark.parametrize(
    ("losses", "epochs", "falls_after"),
    [
        ([9.0], MOST_EPOCHS, MOST_EPOCHS - 1),
        ([9.0, 5.0, 3.0], MOST_EPOCHS, MOST_EPOCHS - 1),  # it still falls
        ([9.0, 5.0, 3.0, 3.0], 4, 3),  # the third epoch brought nothing
        ([9.0, 5.0, 3.0, 2.95], 4, 3),  # or too little
        ([9.0, 5.0, 3.0, 2.93], MOST_EPOCHS, MOST_EPOCHS - 1),
        ([9.0, 9.5], 2, 1),  # no epoch is better than none
        ([9.0, 5.0, 6.0, 4.0], 3, 2),  # what comes after the end was known changes nothing
        ([9.0, *(8.0 / 2**i for i in range(MOST_EPOCHS - 1))], MOST_EPOCHS, MOST_EPOCHS - 1),
        ([9.0, *(8.0 / 2**i for i in range(MOST_EPOCHS - 2)), 8.0], MOST_EPOCHS, MOST_EPOCHS - 1),
    ],
)
def test_the_run_ends_an_epoch_after_one_that_hardly_lowers_the_loss(
    losses: list[float], epochs: int, falls_after: int
) -> None:
    plan = plan_after(losses)
    assert (plan.steps, plan.falls_after) == (epochs * EPOCH, falls_after * EPOCH)
    assert plan.evaluates_after(plan.steps) and plan.checkpoints_after(plan.steps)


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
def test_the_rate_stays_at_its_peak_and_falls_to_zero_over_the_last_epoch(schedule: str) -> None:
    asked = auto(schedule=schedule, warmup=0.25)
    plan = plan_after([9.0, 5.0, 5.0], asked)
    rates = [learning_rate(asked, plan, step) for step in range(plan.steps)]
    assert plan.warmup == 3, "a quarter of the three epochs that a run is foretold to have"
    assert rates[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert rates[3:9] == [0.5] * 6
    assert all(after < before for before, after in pairwise(rates[8:]))
    longest = make_plan(asked, 13)
    assert learning_rate(asked, longest, 8) == 0.5 and longest.warmup == 3


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_a_number_of_epochs_is_obeyed(epochs: int | None) -> None:
    asked = auto(epochs=epochs)
    plan = make_plan(asked, 13)
    assert plan.steps == (epochs or 3) * EPOCH
    assert known_end(asked, plan, [(0, 9.0), (4, 9.0), (8, 9.0)]) == plan


# Real steps


def whole(folder: Path, asked: Recipe) -> list[Event]:
    return list(trainer(folder, asked=asked).events())


def of(kind: type[Event], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_run_trains_until_its_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    events = whole(tmp_path, auto(learning_rate=0.1))
    (known,) = of(EndKnown, events)
    losses = [event.loss for event in of(Validated, events)]
    epochs = known.step // EPOCH
    lowered = [after <= min(losses[: i + 1]) * (1 - FALLS) for i, after in enumerate(losses[1:])]
    assert lowered[: epochs - 1] == [True] * (epochs - 1) and not lowered[epochs - 1]
    assert 1 < epochs < MOST_EPOCHS - 1, "the toy should neither stop at once nor go on to the bound"
    assert known.steps == known.step + EPOCH == of(StepDone, events)[-1].step == of(Finished, events)[0].step
    assert of(CheckpointSaved, events)[-1].step == known.steps
    rates = [event.learning_rate for event in of(StepDone, events)]
    assert rates == pytest.approx([0.1] * (known.step + 1) + [0.075, 0.05, 0.025])
    status = Status()
    for event in events:
        status.update(event)
    assert status.steps == known.steps
    assert f"to zero at step {known.steps}" in (sentence(known) or "")


def test_early_stopping_holds_too(tmp_path: Path) -> None:
    asked = auto(learning_rate=3.0, early_stopping=1)
    events = whole(tmp_path, asked)
    (stopped,) = of(StoppedEarly, events)
    assert of(StepDone, events)[-1].step == stopped.step < MOST_EPOCHS * EPOCH
    again = trainer(tmp_path, asked=asked)
    saved, _ = load_newest(tmp_path / "checkpoints")
    assert saved
    again.restore(saved)
    assert [type(event) for event in again.events()] == [RunStarted, Finished]


def test_a_run_that_is_stopped_after_any_step_ends_the_same(tmp_path: Path) -> None:
    asked = auto(learning_rate=0.1)
    made = trainer(tmp_path / "whole", asked=asked)
    steps = curve(list(made.events()))
    for stop in range(1, len(steps)):
        folder, seen = tmp_path / str(stop), []
        first = trainer(folder, asked=asked)
        with pytest.raises(Interrupted):
            for event in first.events():
                seen.append(event)
                first.stopping = first.stopping or (isinstance(event, StepDone) and event.step == stop)
        saved, _ = load_newest(folder / "checkpoints")
        assert saved and saved.state.step == stop
        second = trainer(folder, asked=asked)
        second.restore(saved)
        assert curve([*seen, *second.events()]) == steps
        assert second.state.best_loss == made.state.best_loss and second.best and made.best
        assert all(second.best[name].tobytes() == made.best[name].tobytes() for name in made.best)
