"""Validation rows set apart: pure, stratified, duplicates together."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.rows import Record
from finetune.data.split import set_apart
from finetune.errors import DataError

pairs = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=2, max_size=80)


def records(pairs: list[tuple[int, str]]) -> list[Record]:
    return [Record(f"f:{line}", f"text {text}", answer=label) for line, (text, label) in enumerate(pairs, 1)]


@given(pairs.filter(lambda rows: len({text for text, _ in rows}) > 4), st.floats(0.05, 0.45), st.integers(0, 99))
def test_disjoint_complete_and_duplicates_on_one_side(rows, fraction, seed):
    train, valid = set_apart(records(rows), fraction, seed, stratified=True)
    assert train and valid
    assert sorted([*train, *valid], key=lambda one: one.location) == sorted(records(rows), key=lambda one: one.location)
    assert not {one.key for one in train} & {one.key for one in valid}
    assert set_apart(records(rows), fraction, seed, stratified=True) == (train, valid)


@given(st.permutations(list(range(40))))
def test_the_order_of_the_rows_does_not_matter(shuffled):
    rows = records([(text, "ab"[text % 2]) for text in range(40)])
    _, valid = set_apart(rows, 0.2, 3, stratified=True)
    _, again = set_apart([rows[i] for i in shuffled], 0.2, 3, stratified=True)
    assert {one.key for one in valid} == {one.key for one in again}


def test_stratified():
    rows = records([(text, "abc"[min(text // 60, 2)]) for text in range(100)])  # 60 a, 40 b
    train, valid = set_apart(rows, 0.1, 0, stratified=True)
    assert Counter(one.answer for one in valid) == {"a": 6, "b": 4} and len(train) == 90
    assert {one.key for one in set_apart(rows, 0.1, 1, stratified=True)[1]} != {one.key for one in valid}


def test_rare_labels_stay_in_train():
    rows = records([*((text, "a") for text in range(20)), (20, "rare")])
    train, valid = set_apart(rows, 0.4, 0, stratified=True)
    assert "rare" in {one.answer for one in train} and "rare" not in {one.answer for one in valid}


def test_two_rows_give_one_each():
    train, valid = set_apart(records([(0, "a"), (1, "a")]), 0.1, 0)
    assert (len(train), len(valid)) == (1, 1)


def test_large_duplicate_groups_can_still_be_parted():
    train, valid = set_apart(records([(0, "a")] * 5 + [(1, "a")] * 3), 0.1, 0)
    assert (len(train), len(valid)) == (5, 3)


def test_one_text_cannot_be_parted():
    with pytest.raises(DataError, match="too few different rows"):
        set_apart(records([(0, "a")] * 5), 0.1, 0)
