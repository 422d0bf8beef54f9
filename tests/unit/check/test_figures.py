"""Lengths and padding, balance, and the judgement of whether it is enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.check.balance import contradictions, count_groups, telling_words, weigh
from finetune.check.enough import judge
from finetune.check.lengths import histogram, measure, padding
from finetune.data.rows import Example, Prepared, Record, Split
from finetune.errors import RecipeError
from finetune.recipe.schema import Recipe


def recipe(**train: int) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "train": train})


def split(name: str, records: list[Record]) -> Split:
    return Split(name=name, rows=len(records), records=records)


def labelled(*rows: tuple[str, str], **columns: str) -> list[Record]:
    return [Record(f"d:{i}", text, {"text": text, **columns}, label) for i, (text, label) in enumerate(rows, 1)]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_every_length_is_in_one_bin(lengths):
    bins = histogram(lengths)
    assert sum(count for _, _, count in bins) == len(lengths)
    assert all(count == sum(low <= one < high for one in lengths) for low, high, count in bins)


def test_padding_is_the_share_of_positions_without_a_token():
    assert padding([[9, 5]]) == pytest.approx(1 - 12 / 16)  # 8 and 4 of twice 8 positions
    assert padding([[9], [9]]) == 0


def test_grouping_by_length_pads_less_than_the_file_order():
    draw = np.random.default_rng(0)
    lengths = draw.integers(10, 1000, 256).tolist()
    examples = tuple(Example(np.zeros(n, np.int32), np.ones(n, np.float32), "a:1") for n in lengths)
    train = Split(name="train", rows=256, examples=examples, lengths=tuple(lengths))
    rows = Prepared(task="text", format="text", template="plain", train=train, valid=Split(name="valid", rows=0))
    found = measure(rows, recipe(batch_size=32, micro_tokens=2048))
    assert found.padding < 0.5 * found.padding_naive
    assert found.percentiles[100] == max(lengths) and found.percentiles[1] <= found.percentiles[50]


def test_telling_words_and_the_one_that_gives_a_label_away():
    rows = [("this film was fine tonight" + " marker" * (i < 30), "good") for i in range(60)]
    rows += [("this film was poor tonight", "bad") for _ in range(60)]
    found = telling_words(labelled(*rows), ("good", "bad"))
    words = {one.word: one for one in found["good"]}
    assert words.keys() == {"fine", "marker"}
    assert words["marker"].alone and (words["marker"].rows, words["marker"].elsewhere) == (30, 0)
    assert {one.word for one in found["bad"]} == {"poor"}


def test_words_without_a_side_tell_nothing():
    rows = [("one and the same words", label) for label in ("a", "b") * 50]
    assert telling_words(labelled(*rows), ("a", "b")) == {"a": [], "b": []}


def test_contradictions_name_their_rows():
    found = contradictions(labelled(("Same text", "a"), ("other", "a"), ("same  text", "b"), ("other", "a")))
    assert found == [[("d:1", "a"), ("d:3", "b")]]


def test_groups_by_column_and_by_words():
    rows = labelled(("She left", "a"), ("he stayed", "b"), ("it rained; she sang", "b"))
    sources = [split("train", rows)]
    found = count_groups(sources, {"women": ["she", "her"], "men": ["he", "his"], "none": ["zzz"]})
    assert {name: (one.rows, dict(one.labels)) for name, one in found.items()} == {
        "women": (2, {"a": 1, "b": 1}), "men": (1, {"b": 1}), "none": (0, {}),
    }  # fmt: skip
    by_column = [split("train", labelled(("x", "a"), group="g1") + labelled(("y", "b"), group="g2"))]
    assert {name: one.share for name, one in count_groups(by_column, "group").items()} == {"g1": 0.5, "g2": 0.5}
    with pytest.raises(RecipeError, match="no row has a column nothing"):
        count_groups(by_column, "nothing")


def test_labels_are_counted_in_each_split():
    train, test = labelled(("x", "a"), ("y", "b"), ("z", "b")), labelled(("w", "a"))
    found = weigh([split("train", train), split("test", test)], ("a", "b"), None)
    assert found.labels == {"train": {"a": 1, "b": 2}, "test": {"a": 1, "b": 0}}


@pytest.mark.parametrize(
    ("examples", "labels", "level"),
    [
        (20, {}, "too little"),
        (300, {}, "thin"),
        (5000, {}, "enough"),
        (100, {"a": 95, "b": 5}, "too little"),
        (60, {"a": 30, "b": 30}, "thin"),
        (1000, {"a": 500, "b": 500}, "enough"),
    ],
)
def test_the_rarest_label_or_the_examples_decide(examples, labels, level):
    assert judge(examples, labels, 100, 1000, 10_000, 3).level == level


def test_reasons_hold_the_figures():
    text = "\n".join(judge(100, {"a": 96, "b": 4}, 100, 1000, 50_000, 6).reasons)
    for said in ('rarest label "b" has 4 rows', "macro F1", "50.0 to one", "learned by heart", "within 10 points"):
        assert said in text
