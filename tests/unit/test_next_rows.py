"""Rows to label next, and whether more rows would help."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.check.curve_runs import parts_of
from finetune.check.next_rows import new_rows, next_rows
from finetune.data.rows import Split
from finetune.errors import DataError
from finetune.evaluation.diverse_rows import choose, margins
from finetune.evaluation.learning_curve import SHARES, look_ahead
from tests.end_to_end.command import Work
from tests.unit.test_suspects import labelled
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import prepared, recipe, result_of, session


def test_a_margin_is_what_the_likeliest_label_is_ahead_of_the_next() -> None:
    shares = np.log([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.98, 0.01, 0.01]])
    assert margins(shares - 7) == pytest.approx([0.2, 0.0, 0.97])
    assert margins(np.zeros((3, 1))).tolist() == [0, 0, 0]


def test_rows_of_every_kind_are_chosen_where_all_are_as_uncertain() -> None:
    kinds = [["tall", "tree", "leaf"], ["fast", "car", "road"], ["warm", "soup", "bowl"], ["loud", "song", "drum"]]
    texts = [" ".join([*kinds[min(i // 30, 3)], f"x{i % 7}"]) for i in range(96)]  # the last kind has few rows
    picks = choose(np.full(96, 0.1), texts, [], 4)
    assert sorted(min(i // 30, 3) for i in picks) == [0, 1, 2, 3]


def test_kinds_that_have_answers_already_are_left_for_others() -> None:
    texts = ["tall tree leaf one", "tall tree leaf two", "fast car road one", "fast car road two"] * 3
    for known, kind in (("tall tree leaf six", "car"), ("fast car road six", "tree")):
        first = choose(np.full(12, 0.1), texts, [known] * 4, 1)[0]
        assert kind in texts[first]


def test_a_sure_row_is_not_chosen_before_unsure_ones_of_its_kind() -> None:
    texts = [f"the same words w{i}" for i in range(60)]
    margin = np.full(60, 0.9)
    margin[[3, 40]] = 0.05
    assert {*choose(margin, texts, [], 2)} == {3, 40}
    assert 3 in choose(margin, [f"a{i} b{i}" for i in range(60)], [], 1), "without common words doubt alone decides"


def test_a_large_kind_of_which_a_model_is_less_unsure_comes_before_lone_rows() -> None:
    texts = [f"a{i} b{i} c{i}" for i in range(600)] + [f"tall tree leaf x{i}" for i in range(200)]
    first = choose(np.repeat([0.1, 0.4], [600, 200]), texts, [], 1)[0]
    assert first >= 600


def test_doubt_counts_more_than_a_kind_that_is_a_little_larger() -> None:
    texts = [f"tall tree leaf x{i}" for i in range(10)] + [f"fast car road y{i}" for i in range(15)]
    assert choose(np.repeat([0.0, 0.3], [10, 15]), texts, [], 1)[0] < 10


@pytest.mark.parametrize(("rows", "count"), [(5, 9), (700, 450), (1, 1), (0, 3)])
def test_as_many_rows_as_there_are_each_once(rows: int, count: int) -> None:
    picks = choose(np.linspace(0, 1, rows), [f"row {i % 11} of {i % 5}" for i in range(rows)], ["row 1"], count)
    assert len(picks) == len({*picks}) == min(rows, count)


def test_rows_of_the_run_and_second_copies_are_not_new() -> None:
    trained = prepared(train=3)  # "question 0" and so on
    pool = [labelled(2, set())[0]] * 2
    texts = ["Question  1", "question 77", "QUESTION 77!", "other", "question 2"]
    rows = [type(pool[0])(pool[0].tokens, pool[0].weights, f"p:{i}", None, text) for i, text in enumerate(texts)]
    assert new_rows(rows, trained) == [1, 3]


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_both_kinds_of_task_give_rows_to_label(tmp_path: Path, task: str) -> None:
    trained, pool = prepared(train=6, task=task), prepared(train=6, valid=25, task=task)
    made = result_of(next_rows(session(tmp_path / "model"), recipe(), pool, trained, 0.5, 4))
    assert len({one.number for one in made}) == 4
    assert all(0 <= one.sure <= 1 and bool(one.answer) == (task == "classification") for one in made)


def test_a_model_and_words_that_were_always_right_still_doubt_some_rows(tmp_path: Path) -> None:
    """As sure as right they would be sure of all rows, and the first of the pool would be chosen."""

    def said(split: Split, texts: Sequence[str]) -> Split:
        pairs = zip(split.examples, texts, strict=True)
        return replace(split, examples=tuple(replace(example, prompt=text) for example, text in pairs))

    words = ("dull cold noisy", "warm crisp bright", "plain fair usual")  # of the labels, which take turns
    rows = prepared(train=60, valid=30)
    trained = replace(
        rows, train=said(rows.train, [f"{words[i % 3]} n{i}" for i in range(60)]), valid=Split("valid", 0)
    )
    pool = replace(
        rows, valid=said(rows.valid, [f"{words[i % 3] if i < 27 else 'dull warm plain'} p{i}" for i in range(30)])
    )
    made = result_of(next_rows(session(tmp_path / "model"), recipe(), pool, trained, 1.0, 3))
    assert {one.number for one in made} & {27, 28, 29}
    assert len({round(one.sure, 6) for one in made}) > 1


def test_parts_of_the_rows_lie_in_each_other() -> None:
    rows = prepared(train=50)
    quarter, half, whole = parts_of(rows, 3)
    assert (len(quarter), len(half), len(whole)) == (13, 25, 50)
    assert {*quarter} < {*half} < {*whole} == {example.location for example in rows.train.examples}
    with pytest.raises(DataError, match="too few for a learning curve, which needs 40"):
        parts_of(prepared(train=39), 3)


@pytest.mark.parametrize(
    "answers",
    [["good"] * 57 + ["bad"] * 3, ["a", "b", "c"] * 20, ["good"] * 59 + ["bad"], [f"l{i % 15}" for i in range(60)]],
    ids=["few", "even", "one", "many"],
)
def test_each_label_has_its_share_in_every_part(answers: list[str]) -> None:
    rows = prepared(train=60)
    examples = [replace(one, answer=answer) for one, answer in zip(rows.train.examples, answers, strict=True)]
    labelled = replace(rows, train=replace(rows.train, examples=examples))
    of = {example.location: example.answer for example in examples}
    for part, share in zip(parts_of(labelled, 3), SHARES, strict=True):
        count = Counter(of[location] for location in part)
        assert all(abs(count[label] - share * answers.count(label)) < 1 for label in {*answers})
    assert parts_of(labelled, 3) != parts_of(labelled, 4)


def test_rows_without_labels_are_drawn_as_before() -> None:
    rows = replace(prepared(train=50), label_tokens=(), labels=())
    drawn = np.random.default_rng(3).permutation(50)
    assert parts_of(rows, 3)[0] == [rows.train.examples[i].location for i in drawn[:13]]


def right(share: float, rows: int = 400, seed: int = 0) -> Any:
    """Costs of rows that are right with this probability; of one seed the same rows are the hard ones."""
    return (np.random.default_rng(seed).uniform(size=rows) > share).astype(float)


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ((0.5, 0.75, 0.875), "yes"),
        ((0.6, 0.76, 0.856), "yes"),
        ((0.9, 0.9, 0.9), "hardly"),
        ((1.0, 1.0, 1.0), "hardly"),
    ],
)
def test_a_curve_that_falls_on_says_that_more_rows_help(shares: tuple[float, float, float], answer: str) -> None:
    assert look_ahead([right(share) for share in shares]).answer == answer


def test_a_model_that_answers_blindly_says_nothing_of_more_rows() -> None:
    """A jump from chance cannot be foreseen: what is better stays possible, and no promise is made."""
    blind = [right(share) for share in (0.48, 0.51, 0.5)]
    assert look_ahead(blind).low > 0.3, "else no part of the test"
    ahead = look_ahead(blind, 0.5)
    assert ahead.answer == "nothing learned" and ahead.low < 0.01 and ahead.high == look_ahead(blind).high
    seeing = [right(share) for share in (0.48, 0.51, 0.6)]
    assert look_ahead(seeing, 0.5) == look_ahead(seeing)


def test_noise_makes_the_interval_wide_and_the_answer_modest() -> None:
    calm = look_ahead([right(share) for share in (0.7, 0.75, 0.8)])
    noisy = look_ahead([right(share, 80, seed) for seed, share in enumerate((0.7, 0.75, 0.8))])
    assert noisy.high - noisy.low > 2 * (calm.high - calm.low)
    assert noisy.answer != "yes"


@pytest.mark.parametrize(("start", "power"), [(0.8, 0.3), (0.5, 0.5), (0.9, 0.1), (3.0, 0.4)])
def test_a_power_law_is_followed_to_twice_the_rows(start: float, power: float) -> None:
    spread = np.linspace(0.5, 1.5, 101)  # losses of the rows, around their mean
    seen = [start * share**-power * spread * 0.25**power for share in (0.25, 0.5, 1.0)]
    ahead = look_ahead(seen)
    assert ahead.low <= start * 0.25**power * 2**-power <= ahead.high


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    made = Work.of_one_block(tmp_path_factory)
    rows = [{"text": example.prompt, "label": str(example.answer)} for example in labelled(60, set())]
    made.lines("rows.jsonl", rows[:44])
    made.lines("valid.jsonl", rows[20:30])
    made.lines("pool.jsonl", [{"id": i, "text": row["text"]} for i, row in enumerate(rows)])
    made.recipe(RECIPE, "few.yaml")
    finetune(made, "train", "few.yaml", "output=runs").good()
    return made


def run_of(work: Work) -> Path:
    return next((work.folder / "runs").glob("few-*"))


def test_the_command_writes_new_rows_with_all_their_columns(work: Work) -> None:
    said = finetune(work, "next", "pool.jsonl", "--rows", "5").good()
    file = run_of(work) / "next.jsonl"
    made = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(made) == 5 and all(list(row) == ["id", "text"] and row["id"] >= 44 for row in made)
    assert "Label next: 5 of 16 new rows" in said.out
    before = file.read_bytes()
    assert "exists already" in finetune(work, "next", "pool.jsonl").failed(2)
    assert file.read_bytes() == before
    finetune(work, "next", "pool.jsonl", "--rows", "500", "-o", "all.csv").good()
    assert len((work.folder / "all.csv").read_text().splitlines()) == 17


def test_a_pool_of_rows_that_the_run_knows_and_a_missing_run_are_named(work: Work) -> None:
    assert "every row stands among the run's own rows" in finetune(work, "next", "rows.jsonl", "-o", "x.csv").failed(3)
    moved = Work(work.folder / "moved", work.folder / "model")
    shutil.copy(work.folder / "pool.jsonl", moved.folder)
    assert "no finished run in runs/; name one with --run" in finetune(moved, "next", "pool.jsonl").failed(2)
    assert not (work.folder / "x.csv").exists()


def test_the_curve_says_what_twice_the_rows_would_give_and_leaves_the_run_as_it_was(work: Work) -> None:
    run = run_of(work)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "next.jsonl"}
    said = finetune(work, "curve", str(run)).good()
    assert "with 88 rows expect accuracy" in " ".join(said.out.split())
    told = json.loads((run / "curve.json").read_text())
    assert [part["rows"] for part in told["measured"]] == [11, 22, 44] and told["twice"]["rows"] == 88
    low, high = told["twice"]["accuracy"]
    assert 0 <= low <= high <= 1
    assert all(file.read_bytes() == content for file, content in before.items())
