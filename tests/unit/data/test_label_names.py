"""Labels that look the same are one; labels that are nearly the same are told."""

from __future__ import annotations

import json
import unicodedata

import pytest
from toy_tokenizers import byte_level

from finetune.data.label_names import MOST, Spellings, look_alikes, refuse_many
from finetune.data.prepare import prepare
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of

DECOMPOSED = unicodedata.normalize("NFD", "café")


def prepared(folder, written: list[str], **data):
    for name, start in (("train.jsonl", 0), ("valid.jsonl", 100)):
        rows = [{"text": f"note {start + n}", "label": label} for n, label in enumerate(written)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"train": "train.jsonl", "valid": "valid.jsonl", **data}
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": asked})
    return result_of(prepare(recipe, byte_level(), base=folder))


@pytest.mark.parametrize(
    ("common", "rare"),
    [
        ("café", DECOMPOSED),
        (DECOMPOSED, "café"),
        ("New York", "New\u00a0York"),
        ("New York", "New  York"),
        ("good", "good\u200b"),
        ("good", "\ufeffgood"),
        ("東 京", "東\u3000京"),
        ("co-op", "co\u00ad-op"),
        ("naïve case", unicodedata.normalize("NFD", "naïve") + "\u202fcase"),
    ],
)
def test_labels_that_look_the_same_are_joined_in_every_split(tmp_path, common, rare):
    found = prepared(tmp_path, [common, "other", common, rare, "other", common])
    assert set(found.labels) == {common, "other"}
    assert [record.answer for record in found.train.records] == [common, "other", common, common, "other", common]
    assert {example.answer for example in found.valid.examples} == {common, "other"}
    for split in (found.train, found.valid):
        (note,) = [note for note in split.notes if "look the same" in note]
        assert f"{common!a} (3), {rare!a} (1)" in note
        assert not split.bad


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("Good", "good", True),
        ("\uff21\uff22", "AB", True),  # full width
        ("1", "1.0", True),
        ("Straße", "STRASSE", True),
        ("good", "goods", False),
        ("1", "1.5", False),
        ("U.S.", "US", False),
        ("m2", "m3", False),
        ("é", "e", False),
        ("не", "нет", False),
        ("👍", "👎", False),
    ],
)
def test_other_labels_stay_and_those_that_look_alike_are_reported(tmp_path, first, second, told):
    found = prepared(tmp_path, [first, second] * 4)
    assert set(found.labels) == {first, second}
    assert not any("look the same" in note for note in found.train.notes)
    assert look_alikes(found.labels) == ([list(found.labels)] if told else [])


def test_the_recipes_own_spelling_is_kept(tmp_path):
    found = prepared(tmp_path, ["New York", "x", "New York", "New\u00a0York"], labels=["New\u00a0York", "x"])
    assert found.labels == ("New\u00a0York", "x")
    assert not found.train.bad
    both = prepared(tmp_path, ["a b", "a\u00a0b"] * 3, labels=["a b", "a\u00a0b"])
    assert both.labels == ("a b", "a\u00a0b")
    assert [record.answer for record in both.train.records] == ["a b", "a\u00a0b"] * 3


def test_a_single_spelling_is_left_as_it_is():
    spellings = Spellings(["New\u00a0York", "x"])
    assert spellings.of("New\u00a0York") == "New\u00a0York"
    assert spellings.of("New York") == "New\u00a0York"  # of another split
    assert spellings.of("unknown") == "unknown"
    assert spellings.notes(["x", "New\u00a0York"]) == []


def test_check_tells_labels_that_differ_in_case(tmp_path):
    from tests.unit.check.surveys import page, recipe, surveyed

    rows = [{"text": f"the day {n} was fine", "label": ("Good", "good", "bad")[n % 3]} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level()
    found = surveyed(tokenizer, recipe(str(tmp_path / "rows.jsonl")))
    assert found.balance.alike == [["Good", "good"]]
    assert "labels that look alike" in page(found, tokenizer)


@pytest.mark.parametrize(
    ("count", "rows", "why"),
    [
        (150, 150, "nearly every row has its own"),
        (400, 700, "nearly every row"),
        (MOST + 1, 9000, "4,096 are the most"),
    ],
)
def test_labels_without_end_are_one_sentence(tmp_path, count, rows, why):
    with pytest.raises(DataError, match=rf"^train\.jsonl:1: {count:,} different labels in {rows:,} rows: {why}"):
        prepared(tmp_path, [f"label {n % count}" for n in range(rows)])


@pytest.mark.parametrize(("count", "rows"), [(60, 60), (150, 400), (1000, 3000)])
def test_many_labels_that_come_again_are_labels(count, rows):
    refuse_many([Row({"label": f"label {n % count}"}, "f", n) for n in range(1, rows + 1)], "label")


@pytest.mark.parametrize("label", [lambda n: n, lambda n: n / 7, lambda n: f" {n}"])
def test_numbers_are_labels_too(label):
    with pytest.raises(DataError, match=r"^f:1: 200 different labels in 200 rows"):
        refuse_many([Row({"label": label(n)}, "f", n) for n in range(1, 201)], "label")


def test_labels_of_the_recipe_are_not_counted(tmp_path):
    labels = [f"label {n}" for n in range(150)]
    assert prepared(tmp_path, labels, labels=labels).labels == tuple(labels)
