"""When things happen, and the learning rate of every step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe.schedule import learning_rate, make_plan
from tests.unit.toy_run import recipe


def rates(rows: int = 10, **train: object) -> list[float]:
    """10 rows one by one: 10 steps an epoch."""
    settings = {"epochs": 1, "batch_size": 1, "learning_rate": 0.5, "warmup": 0.0, "checkpoint_every": None}
    made = recipe(train=settings | train)
    plan = make_plan(made, rows)
    return [learning_rate(made, plan, step) for step in range(plan.steps)]


def test_constant_is_constant() -> None:
    assert rates(schedule="constant") == [0.5] * 10


def test_linear_falls_from_the_peak_in_equal_steps() -> None:
    assert rates(schedule="linear") == pytest.approx([0.5 * (10 - step) / 10 for step in range(10)], rel=1e-15)


def test_cosine_is_half_a_wave() -> None:
    expected = [0.25 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected, rel=1e-15)
    assert rates(schedule="cosine")[5] == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_the_rest_follows_the_schedule(schedule: str) -> None:
    found = rates(schedule=schedule, warmup=0.4)
    assert found[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5], rel=1e-15)
    after = {
        "constant": [0.5] * 6,
        "linear": [0.5 * (6 - step) / 6 for step in range(6)],
        "cosine": [0.25 * (1 + math.cos(math.pi * step / 6)) for step in range(6)],
    }
    assert found[4:] == pytest.approx(after[schedule], rel=1e-15)


def test_the_default_is_linear_with_a_twentieth_of_warmup() -> None:
    made = recipe(train={"epochs": 4, "batch_size": 1})
    plan = make_plan(made, 10)
    assert (made.train.shape, plan.warmup) == ("linear", 2)


@given(
    rows=st.integers(1, 50),
    batch=st.integers(1, 60),
    epochs=st.integers(1, 5),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_every_rate_is_above_zero_and_at_most_the_peak(
    rows: int, batch: int, epochs: int, warmup: float, schedule: str
) -> None:
    found = rates(rows, batch_size=batch, epochs=epochs, warmup=warmup, schedule=schedule)
    assert len(found) == -(-rows // batch) * epochs
    assert all(0 < rate <= 0.5 for rate in found)


@pytest.mark.parametrize(
    ("train", "rows", "steps", "per_epoch"),
    [
        ({"epochs": 2, "batch_size": 4}, 13, 8, 4),  # the short last step is a step
        ({"epochs": 2, "batch_size": 4}, 12, 6, 3),
        ({"epochs": 1, "batch_size": 16}, 5, 1, 1),
        ({"epochs": None, "batch_size": 4}, 13, 12, 4),  # three epochs unless something is said
        ({"epochs": None, "steps": 5, "batch_size": 4}, 13, 5, 4),
        ({"epochs": None, "steps": 3, "batch_size": 1}, 13, 3, 13),  # less than an epoch
    ],
)
def test_steps_and_epochs(train: dict[str, object], rows: int, steps: int, per_epoch: int) -> None:
    plan = make_plan(recipe(train=train), rows)
    assert (plan.steps, plan.steps_per_epoch) == (steps, per_epoch)


def test_validations_and_checkpoints_at_their_steps_and_at_the_end() -> None:
    plan = make_plan(recipe(), 13)
    assert [step for step in range(1, 9) if plan.evaluates_after(step)] == [2, 4, 6, 8]
    assert [step for step in range(1, 9) if plan.checkpoints_after(step)] == [3, 6, 8]


def test_without_a_word_both_come_at_the_end_of_every_epoch() -> None:
    plan = make_plan(recipe(train={"checkpoint_every": None, "epochs": None, "steps": 10}, evaluate={}), 13)
    assert [step for step in range(1, 11) if plan.evaluates_after(step)] == [4, 8, 10]
    assert [step for step in range(1, 11) if plan.checkpoints_after(step)] == [4, 8, 10]
