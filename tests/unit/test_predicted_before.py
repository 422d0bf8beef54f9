"""What comes before the first step is predicted too, and what the loaded model was seen to take corrects it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backends.interface import LoraSpec, OutOfMemory
from finetune.events import Progress
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import MICRO_TOKENS
from finetune.training import predicted_time
from finetune.training.extra_evaluations import Seconds
from finetune.training.predicted_time import racing, timed
from finetune.training.rate_race import RACE, course_of
from finetune.training.rate_rule import LANES
from finetune.training.speed import Speed
from tests.unit.test_forecast import work
from tests.unit.toy_run import prepared

SPEED = Speed(1e12, beside=False)
ROWS = prepared(train=200, valid=40)


def recipe(rate: Any = "auto", **more: Any) -> Any:
    train = {"learning_rate": rate, "epochs": 20, "batch_size": 16}
    return check_recipe({"model": {"path": "m"}, "data": {"train": "t"}, "train": train, **more})


def seconds(of: Any = None, speed: Speed = SPEED, **changes: Any) -> Seconds:
    made = work(examples=list(ROWS.train.examples), batch_size=16, **changes)
    return Seconds(of or recipe(), ROWS, made, speed, MICRO_TOKENS)


def test_a_race_is_predicted_where_the_rate_is_not_named() -> None:
    assert racing(recipe(2e-4), ROWS, seconds()) == {}
    course = course_of(recipe(), ROWS, "cpu")
    assert course is not None
    (what, predicted), *others = racing(recipe(), ROWS, seconds()).items()
    assert what == RACE and not others
    # Its rows are trained in every lane, so that it is about as long as their share of the epochs.
    epoch = seconds().work.seconds(SPEED, MICRO_TOKENS)
    rows = len(LANES) * course.steps * course.batch / len(ROWS.train.examples)
    assert rows * epoch < predicted < 1.3 * rows * epoch


def test_a_run_too_short_for_a_race_has_none() -> None:
    short = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"steps": 2}})
    assert course_of(short, ROWS, "cpu") is None and racing(short, ROWS, seconds()) == {}


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_the_loaded_model_s_own_rows_correct_all_parts(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(predicted_time.time, "perf_counter", lambda: now[0])

    def scored(session: object, rows: Any, tokens: int) -> Any:
        calls.append(len(rows))
        now[0] += slower * seconds().reading(rows) * (50 if len(calls) == 1 else 1)  # the first chooses kernels
        yield Progress(0, "loss", 1, 1)

    monkeypatch.setattr(predicted_time, "row_losses", scored)
    factor = timed(None, seconds())  # type: ignore[arg-type]
    assert factor == pytest.approx(slower) and len(calls) == 4
    before = seconds().evaluation(ROWS.valid.examples)
    corrected = seconds(speed=replace(SPEED, slower=factor))
    assert corrected.evaluation(ROWS.valid.examples) == pytest.approx({n: t * slower for n, t in before.items()})


@pytest.mark.parametrize(
    "asked",
    [
        seconds(speed=Speed(1.0)),  # too slow for it
        seconds(adapted=work(last=1).adapted),  # what frozen blocks make of the rows is kept after the first time
        seconds(recipe(head={})),
        Seconds(recipe(), ROWS, seconds().work, SPEED, 1),  # no row is as short
    ],
    ids=["slow", "frozen blocks", "head", "no row"],
)
def test_where_rows_are_not_simply_scored_none_is(monkeypatch: pytest.MonkeyPatch, asked: Seconds) -> None:
    monkeypatch.setattr(predicted_time, "row_losses", lambda *_: pytest.fail("rows are scored"))
    assert timed(None, asked) == 1.0  # type: ignore[arg-type]


def test_too_little_memory_corrects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(*_: object) -> Any:
        raise OutOfMemory("full")
        yield

    monkeypatch.setattr(predicted_time, "row_losses", scored)
    assert timed(None, seconds(lora=LoraSpec(4, 8.0))) == 1.0  # type: ignore[arg-type]
