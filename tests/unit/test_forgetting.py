"""Forgetting: said where it is planted, not where little changed, and never dearer than a share of the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.data.rows import Example, Split
from finetune.data.tokenizer import load_tokenizer
from finetune.evaluation.analysis import rows_again, run_tokens
from finetune.evaluation.forgetting import (
    Change,
    GeneralText,
    beyond,
    change_of,
    general_text,
    judge,
    measuring,
    pieces,
)
from finetune.evaluation.scoring import RowLosses
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import MICRO_TOKENS
from finetune.training.general_text import affordable, computed_share
from finetune.training.job import find_folder
from finetune.training.predicted_time import seconds_of_parts
from finetune.training.sampled_steps import Rows
from finetune.training.speed import Speed
from tests.unit.test_forecast import work
from tests.unit.test_groups import evaluation
from tests.unit.toy_run import dataset, prepared, recipe, result_of, session, trainer


@pytest.fixture(scope="module")
def tokenizer() -> object:
    asked = check_recipe({"model": {"path": "builtin:reviews-base"}, "data": {"train": "builtin:reviews/train.jsonl"}})
    return load_tokenizer(find_folder(asked))


def test_the_pieces_are_200_of_five_kinds_in_turn(tokenizer: object) -> None:
    whole = pieces(tokenizer, None)
    kinds, examples = whole.kinds, whole.examples
    assert Counter(kinds) == dict.fromkeys(("encyclopaedic", "dialogue", "code", "instructions", "arithmetic"), 40)
    assert kinds[:5] == kinds[5:10] and len({example.tokens.tobytes() for example in examples}) == 200
    assert all(example.weights[0] == 0 and 4 < len(example) <= 64 for example in examples)


def test_a_piece_with_tokens_that_the_model_lacks_is_left_out(tokenizer: object) -> None:
    every = pieces(tokenizer, None).examples
    limit = sorted(int(example.tokens.max()) for example in every)[100]
    examples = pieces(tokenizer, limit).examples
    assert 0 < len(examples) <= 100 and all(example.tokens.max() < limit for example in examples)


def losses(each: list[float]) -> RowLosses:
    n = len(each)
    ones = np.ones(n, np.int64)
    return RowLosses(np.array(each) * 10, ones, ones * 10, ones)


def changed(by: float, spread: float, n: int = 100) -> Change:
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, n)
    return change_of("all", losses(base.tolist()), losses((base + rng.normal(by, spread, n)).tolist()), range(n))


def test_the_change_is_paired() -> None:
    change = changed(0.3, 0.1)
    assert change.change == pytest.approx(0.3, abs=0.03)
    assert change.interval[1] - change.interval[0] < 0.06  # the pieces themselves differ by far more


@pytest.mark.parametrize(("by", "spread", "verdict"), [(1.0, 0.3, "forgot"), (0.02, 0.1, "none"), (-0.5, 0.3, "none")])
def test_a_rise_beyond_the_margin_is_said(by: float, spread: float, verdict: str) -> None:
    told = judge([changed(by, spread), changed(by, spread)], evaluation([True]), evaluation([True]))
    assert told.verdict == verdict
    assert told.message.startswith("Forgot: loss on 100 pieces" if verdict == "forgot" else "No forgetting")
    assert told.p_value is not None and (told.p_value < 0.01) is (verdict == "forgot")


def test_less_than_was_gained_is_said_as_such() -> None:
    base = replace(evaluation([True] * 9), loss=3.0)
    base = replace(base, results=tuple(replace(row, loss=3.0) for row in base.results))
    told = judge([changed(1.0, 0.3)] * 2, base, evaluation([True] * 9))
    assert told.verdict == "some" and told.gain == 2.0 and told.message.startswith("It forgot less than it gained")
    assert told.p_value is not None and told.p_value < 0.01 < (told.p_more or 0)
    assert judge([changed(3.0, 0.3)] * 2, base, evaluation([True] * 9)).verdict == "forgot"


def test_a_wide_interval_says_nothing() -> None:
    assert beyond(changed(0.5, 5.0, 30), 0.1) > 0.01


def test_a_run_too_short_says_so() -> None:
    told = judge((), None, evaluation([True]))
    assert (told.verdict, told.p_value) == ("too short to say", None) and "not measured" in told.message


def test_the_base_is_measured_without_the_adapter_and_the_tuned_model_is_left_as_it_was(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = GeneralText(["code"] * 40, dataset("x", 40, 5).examples, 10)
    monkeypatch.setattr("finetune.evaluation.forgetting.pieces", lambda *_: general)
    live = session(tmp_path / "model")
    state = live.get_state()
    rng = np.random.default_rng(0)
    live.set_state(
        type(state)(3, {n: rng.standard_normal(t.shape).astype(np.float32) for n, t in state.adapter.items()}, {})
    )
    kept = live.get_state()
    changes = result_of(measuring(live, general, frozenset({2}), 4096))
    assert [change.name for change in changes] == ["all", "code", "answers"]
    assert changes[0].change > 0.1 and changes[2].pieces <= 10
    assert all(np.array_equal(kept.adapter[n], t) for n, t in live.get_state().adapter.items())
    assert general_text(tokenizer, 10**6, None) == general
    some = general_text(tokenizer, 800, None)  # too few for answers of its own to tell anything
    assert 20 <= len(some.examples) < 40 and not some.halves
    assert [one.name for one in result_of(measuring(live, some, frozenset({2}), 4096))] == ["all", "code"]
    few = general_text(tokenizer, 100, None)  # too few for what it may cost
    assert not few.examples and result_of(measuring(live, few, frozenset({2}), 4096)) == ()


def test_it_costs_a_share_of_the_run() -> None:
    rows = prepared(train=200, valid=50)
    few, many = (recipe(train={"epochs": epochs}) for epochs in (1, 10))
    assert run_tokens(many, rows) > 5 * run_tokens(few, rows) > 0
    assert rows_again(few, rows) == 0  # labels are not asked again


@pytest.mark.parametrize("vocabulary", [500, 200_000])
def test_what_it_reads_is_a_share_of_what_the_run_computes(vocabulary: int) -> None:
    """Whatever the head weighs, through which only general text passes with every token."""
    rows = prepared(train=200, valid=50)
    asked = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"epochs": 3}})
    made = work(examples=rows.train.examples)
    made = replace(made, architecture=replace(made.architecture, vocabulary=vocabulary))
    whole = sum(seconds_of_parts(asked, rows, made, Speed(1.0), MICRO_TOKENS).values())
    tokens = affordable(asked, rows, made)
    assert tokens > 0 and made.scoring(Rows.of([32] * int(tokens / 32)), int(tokens)) <= 0.05 * whole


def test_what_rows_begin_with_alike_is_computed_once_a_step() -> None:
    def of(*rows: list[int]) -> float:
        made = tuple(Example(np.array(row, np.int32), np.ones(len(row), np.float32), "x") for row in rows)
        return computed_share(replace(prepared(), train=Split("train", len(made), examples=made)), 2)

    assert of([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 7]) == pytest.approx(6 / 8)
    assert of([1, 2], [3, 4]) == 1 and of([1, 2], [1, 2]) == pytest.approx(1 / 2)


def changes_of(folder: Path, tokenizer: object, seed: int, rate: float, epochs: int, label: str | None) -> str:
    """The verdict on a run of the reference backend, whose general text is rows of random tokens."""
    rows = prepared(train=48, valid=8)
    if label:
        chosen = tuple(row for row in rows.train.examples if row.answer == label)
        rows = replace(rows, train=replace(rows.train, rows=len(chosen), examples=chosen))
    live = session(folder / "model", dropout=0.0, seed=seed)
    run = trainer(folder, live, recipe(train={"epochs": epochs, "learning_rate": rate}, seed=seed), rows)
    for _ in run.events():
        pass
    general = general_text(tokenizer, 10**6, None)
    told = judge(result_of(measuring(live, general, frozenset({2}), 4096)), None, evaluation([True]))
    return told.verdict


@pytest.mark.slow
def test_planted_forgetting_is_said_in_20_of_20_seeds_and_a_usual_run_in_none(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = [row for row in dataset("general", 120, 77).examples if row.answer != "yes"]  # nothing of what is planted
    monkeypatch.setattr(
        "finetune.evaluation.forgetting.pieces", lambda *_: GeneralText(["code"] * len(general), general)
    )
    usual = [changes_of(tmp_path / f"a{seed}", tokenizer, seed, 0.002, 3, None) for seed in range(20)]
    planted = [changes_of(tmp_path / f"b{seed}", tokenizer, seed, 0.02, 10, "yes") for seed in range(20)]
    assert planted == ["forgot"] * 20
    assert usual.count("forgot") <= 1
