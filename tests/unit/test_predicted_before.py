"""What comes before the first step is predicted too, and what the loaded model was seen to take corrects it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backends.interface import LoraSpec, OutOfMemory
from finetune.data.collate import step_indices
from finetune.events import Progress
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import MICRO_TOKENS
from finetune.training import predicted_time
from finetune.training.extra_evaluations import Seconds
from finetune.training.predicted_time import racing, timed, timed_steps
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
        Seconds(recipe(), ROWS, seconds().work, SPEED, 1),  # no row is as short
        seconds(adapted=work(last=1).adapted),
    ],
    ids=["slow", "no row", "frozen"],
)
def test_where_rows_are_not_simply_scored_none_is(monkeypatch: pytest.MonkeyPatch, asked: Seconds) -> None:
    monkeypatch.setattr(predicted_time, "row_losses", lambda *_: pytest.fail("rows are scored"))
    assert timed(None, asked) == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("slower", [0.5, 3.0])
def test_steps_of_training_correct_training_alone(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    now, steps, states = [0.0], list[int](), list[str]()
    monkeypatch.setattr(predicted_time.time, "perf_counter", lambda: now[0])

    class Timed:
        def __init__(self, _: Any, rows: Any, short: Any, tokens: int) -> None:
            assert rows is ROWS and short.train.steps == 3 and tokens == MICRO_TOKENS

        def step(self, number: int) -> Any:
            rows = [ROWS.train.examples[i] for i in step_indices(200, 16, 0, number)]
            alone = replace(seconds().work, examples=rows, batch_size=16).seconds(SPEED, MICRO_TOKENS)
            steps.append(number)
            now[0] += slower * alone * (50 if number == 0 else 1)  # the first chooses kernels
            yield Progress(0, "step", 1, 1)

    class Held:
        def get_state(self) -> str:
            return "before"

        def set_state(self, state: str) -> None:
            states.append(state)

    monkeypatch.setattr(predicted_time, "unsaved", Timed)
    factor = timed_steps(Held(), seconds())  # type: ignore[arg-type]
    assert factor == pytest.approx(slower) and steps == [0, 1, 2] and states == ["before"]
    corrected = seconds(speed=replace(SPEED, training_slower=factor))
    assert corrected.work.seconds(corrected.speed, 64) == pytest.approx(slower * seconds().work.seconds(SPEED, 64))
    assert corrected.evaluation(ROWS.valid.examples) == seconds().evaluation(ROWS.valid.examples)


@pytest.mark.parametrize(
    "asked",
    [
        seconds(speed=Speed(1.0)),  # too slow for it
        seconds(check_recipe({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"steps": 39, "epochs": None}})),
        seconds(lora=LoraSpec(4, 8.0, whole=True)),
        seconds(recipe(preferences={})),
        seconds(adapted=work(last=1).adapted),
    ],
    ids=["slow", "short", "whole", "pairs", "frozen"],
)
def test_where_steps_would_take_long_none_is_timed(asked: Seconds) -> None:
    assert timed_steps(None, asked) is None  # type: ignore[arg-type]


def test_without_timed_steps_training_is_corrected_halfway() -> None:
    by_rows = replace(SPEED, slower=1.5)
    assert by_rows.of_training.slower == 1.25 and SPEED.of_training.slower == 1.0
    assert replace(by_rows, training_slower=0.8).of_training.slower == 0.8
    assert seconds().work.seconds(by_rows, 64) == pytest.approx(1.25 * seconds().work.seconds(SPEED, 64))


def test_too_little_memory_corrects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(*_: object) -> Any:
        raise OutOfMemory("full")
        yield

    monkeypatch.setattr(predicted_time, "row_losses", scored)
    assert timed(None, seconds(lora=LoraSpec(4, 8.0))) == 1.0  # type: ignore[arg-type]
