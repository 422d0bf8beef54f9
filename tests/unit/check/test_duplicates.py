"""Exact and near duplicates, and leaks, with the rows named."""

from __future__ import annotations

import random

import numpy as np
import pytest

from finetune.check.duplicates import Duplicates, Pair, find_duplicates
from finetune.data import near_duplicates
from finetune.data.near_duplicates import minhash, shingles
from finetune.data.rows import Record, Split
from tests.unit.toy_run import result_of

WORDS = [f"word{i}" for i in range(2000)]


def duplicates_of(*splits: Split, labelled: bool = True) -> Duplicates:
    return result_of(find_duplicates(splits, labelled))


def split(name: str, *texts: str, answers: list[str] | None = None) -> Split:
    answers = answers or ["yes"] * len(texts)
    records = [
        Record(f"{name}:{i}", text, answer=answer)
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)
    ]
    return Split(name=name, rows=len(records), records=records)


def sentence(draw: random.Random, words: int = 40) -> list[str]:
    return draw.choices(WORDS, k=words)


def test_exact_duplicates_whatever_their_case_and_spaces():
    found = duplicates_of(split("train", "A good film", "another", "a  GOOD\nfilm"))
    assert found.exact == [Pair("train:3", "train:1", 1.0)]
    assert not found.near and not found.leaks


def test_the_answer_counts_where_it_is_no_label():
    rows = split("train", "how are you", "how are you", answers=["fine", "well"])
    assert not duplicates_of(rows, labelled=False).exact
    assert len(duplicates_of(rows).exact) == 1


def test_near_duplicates_are_found_with_their_similarity():
    draw = random.Random(0)
    rows = [sentence(draw) for _ in range(200)]
    for i in range(0, 100, 5):
        rows.append([*rows[i][:-1], "other"])
    found = duplicates_of(split("train", *map(" ".join, rows)))
    assert [(one.location, one.other) for one in found.near] == [
        (f"train:{201 + k}", f"train:{5 * k + 1}") for k in range(20)
    ]
    assert {one.similarity for one in found.near} == {round(37 / 39, 3)}


def test_leaks_name_both_rows_and_are_found_through_every_split():
    draw = random.Random(1)
    shared, near = sentence(draw), sentence(draw)
    train = split("train", " ".join(shared), " ".join(near))
    valid = split("valid", " ".join(shared).upper())
    test = split("test", " ".join([*near[1:], "x"]), "fresh words that stand nowhere else at all")
    found = duplicates_of(train, valid, test)
    assert [(a, b, one.location, one.other) for a, b, one in found.leaks] == [
        ("valid", "train", "valid:1", "train:1"),
        ("test", "train", "test:1", "train:2"),
    ]


def test_the_same_question_leaks_whatever_its_answer():
    rows = split("train", "who is it"), split("test", "who is it", answers=["nobody"])
    found = duplicates_of(*rows, labelled=False)
    assert len(found.leaks) == 1


@pytest.mark.parametrize(("changed", "is_near"), [(0, True), (1, True), (8, False), (20, False)])
def test_near_is_decided_by_the_sets_themselves(changed, is_near):
    draw = random.Random(2)
    for _ in range(30):
        first = sentence(draw, 60)
        other = [f"new{i}" for i in range(changed)] + first[changed:]
        found = duplicates_of(split("train", " ".join(first), " ".join(other) + " ."))
        assert bool(found.near or found.exact) == is_near


def test_rows_of_one_template_cost_no_more(monkeypatch):
    """All 3,000 rows share most of their words, and each is compared once, not with every other."""
    draw = random.Random(3)
    frame = " ".join(sentence(draw, 60))
    rows = [f"{frame} {' '.join(sentence(draw, 6))}" for _ in range(3000)]
    compared = []
    monkeypatch.setattr(near_duplicates, "similarity", lambda *texts: compared.append(texts) or 0.0)
    duplicates_of(split("train", *rows))
    assert 2900 < len(compared) < 3000


def test_shingles_are_a_set_of_runs():
    runs, counts = shingles(["a b c a b c a b c", "two words", "Some, words here!", "", "some words HERE"])
    assert counts.tolist() == [3, 0, 1, 0, 1] and runs[3] == runs[4]
    assert sorted(runs[:3]) == runs[:3].tolist() == shingles(["a b c a b c a b c"])[0].tolist()
    assert [len(found) for found in shingles([])] == [0, 0]


def test_signatures_estimate_the_similarity_of_the_sets():
    draw = random.Random(4)
    first = [" ".join(sentence(draw, 80)) for _ in range(40)]
    other = [" ".join(text.split()[20:] + sentence(draw, 20)) for text in first]
    runs, counts = shingles([*first, *other])
    sets = [set(part.tolist()) for part in np.split(runs, np.cumsum(counts)[:-1])]
    signatures = minhash(runs, counts)
    estimates = (signatures[:40] == signatures[40:]).mean(axis=1)
    truth = [len(a & b) / len(a | b) for a, b in zip(sets[:40], sets[40:], strict=True)]
    assert abs(float(np.mean(estimates)) - float(np.mean(truth))) < 0.03
    assert (signatures[0] == minhash(*shingles([first[0]]))[0]).all(), "whatever is looked at beside it"
