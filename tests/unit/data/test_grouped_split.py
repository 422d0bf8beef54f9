"""Rows that `check` calls the same, or nearly, stay on one side when validation rows are set apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.check.duplicates import find_duplicates
from finetune.data.grouped_split import ALIKE, WORDS, Parted, part
from finetune.data.prepare import prepare
from finetune.data.rows import Prepared, Record, Split
from finetune.data.split import set_apart
from finetune.disk.identity import parting_of
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of

VOCABULARY = [f"word{i}" for i in range(900)]


def parted(texts: Sequence[str], seed: int = 0, fraction: float = 0.2, labels: str = "ab") -> Parted:
    records = [Record(f"f:{i}", text, answer=labels[i % len(labels)]) for i, text in enumerate(texts, 1)]
    return result_of(part(records, fraction, seed, True))


def leaks(found: Parted) -> list[Any]:
    splits = Split("train", 0, records=found.train), Split("valid", 0, records=found.valid)
    return result_of(find_duplicates(splits, True)).leaks


def sentences(count: int, words: int = 20, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(VOCABULARY, k=words)) for _ in range(count)]


@pytest.mark.parametrize(
    "variants",
    [
        ["a good film", "A GOOD FILM", "a  good\tfilm", "A Good\nFilm "],
        ["Straße", "STRASSE", "strasse"],
        ["is it open ?", "IS IT OPEN ?", "is\u00a0it open ?"],
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_the_same_words_stay_on_one_side(variants: list[str], seed: int) -> None:
    texts = [form.replace("film", f"film {i}") + f" {i}" for i in range(12) for form in variants]
    found = parted(texts, seed)
    assert not leaks(found) and found.alike == 0 and 0 < len(found.valid) <= len(texts) / 4


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_nearly_the_same_words_stay_on_one_side(seed: int) -> None:
    texts = [text + end for text in sentences(40) for end in ("", " once", " twice indeed")]
    found = parted(texts, seed)
    assert not leaks(found) and found.alike == 0 and 18 <= len(found.valid) <= 24
    assert {"once", "indeed"} <= {record.key.split()[-1] for record in found.valid}


def test_a_chain_of_rows_stays_on_one_side() -> None:
    """Each is nearly the next, and the last is nothing like the first."""
    long = " ".join(sentences(1, 60)).split()
    texts = [" ".join(long[i : i + 30]) for i in range(0, 30, 2)] + sentences(100, seed=1)
    assert not any(leaks(parted(texts, seed)) for seed in range(10))


def test_the_question_counts_where_answers_are_open() -> None:
    records = [
        Record(f"f:{i}", str(i), answer="x", messages=_turns(f"{ask} {i // 2}", f"answer {i}"))
        for i, ask in enumerate(["who are you", "Who ARE you"] * 20)
    ]
    found = result_of(part(records, 0.2, 0, False))
    sides = [{one.messages[0]["content"].casefold() for one in side} for side in (found.train, found.valid)]
    assert len(found.valid) == 8 and not sides[0] & sides[1]


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def test_a_template_that_wrote_all_rows_is_parted_and_said() -> None:
    frame = sentences(1, 60)[0]
    found = parted([f"{frame} {word}" for word in VOCABULARY[:200]])
    assert len(found.valid) == 40 == found.alike


def test_three_templates_do_not_make_one_of_them_the_validation() -> None:
    frames = sentences(3, 60)
    found = parted([f"{frames[i % 3]} {i}" for i in range(90)], fraction=0.1, labels="a")
    assert len(found.valid) == 9 == found.alike and {record.key.split()[0] for record in found.valid} == {
        frame.split()[0] for frame in frames
    }


def test_labels_keep_their_shares() -> None:
    texts = [form + str(i) for i in range(100) for form in ("Row number ", "row NUMBER ")]
    records = [Record(f"f:{i}", text, answer="a" if i < 150 else "b") for i, text in enumerate(texts)]
    found = result_of(part(records, 0.2, 3, True))
    assert Counter(record.answer for record in found.valid) == {"a": 30, "b": 10}


@given(st.lists(st.integers(0, 60), min_size=6, max_size=80, unique=True), st.integers(0, 99))
def test_without_rows_alike_the_sides_are_what_they_were(numbers: list[int], seed: int) -> None:
    records = [Record(f"f:{i}", f"text {n}", answer="ab"[n % 2]) for i, n in enumerate(numbers)]
    found = result_of(part(records, 0.2, seed, True))
    assert (found.train, found.valid) == set_apart(records, 0.2, seed, stratified=True)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_check_finds_nothing_on_two_sides(seed: int) -> None:
    draw = random.Random(seed)
    texts = sentences(30, seed=seed)
    for _ in range(40):
        words = draw.choice(texts).split()
        words[draw.randrange(len(words))] = draw.choice(VOCABULARY)
        texts.append(" ".join(words).upper() if draw.random() < 0.5 else " ".join(words))
    found = parted(texts, seed)
    assert found.alike or not leaks(found)
    assert len(found.train) + len(found.valid) == len(texts) and parted(texts, seed) == found


def test_one_text_in_many_spellings_cannot_be_parted() -> None:
    with pytest.raises(DataError, match="too few different rows"):
        parted(["Yes", "yes", "YES ", "yes\t"])


def test_many_more_alike_than_validation_shall_have_are_kept_together_up_to_a_bound() -> None:
    frame = sentences(1, 40)[0]
    texts = [f"{frame} {word}" for word in VOCABULARY[:ALIKE]] + sentences(60)
    assert not leaks(parted(texts, fraction=0.1))


def prepared(folder: Path, parting: str | None) -> Prepared:
    rows = [
        {"prompt": form.format(i), "completion": str(i)} for i in range(20) for form in ("What is {}?", "what IS {}?")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}})
    return result_of(prepare(recipe, byte_level(CHATML), base=folder, parting=parting))


def test_a_run_that_says_nothing_of_it_is_parted_as_it_was(tmp_path: Path) -> None:
    new, old = prepared(tmp_path, WORDS), prepared(tmp_path, None)
    assert (new.parting, old.parting) == (WORDS, None)
    assert old.valid.records == set_apart([*old.train.records, *old.valid.records], 0.1, 0)[1] != new.valid.records


@pytest.mark.parametrize(
    ("identity", "how"), [(None, WORDS), ({}, None), ({"kind": 2}, None), ({"parting": WORDS}, WORDS)]
)
def test_how_a_run_was_parted_stands_in_its_identity(tmp_path: Path, identity: Any, how: str | None) -> None:
    if identity is not None:
        (tmp_path / "identity.json").write_text(json.dumps(identity))
    assert parting_of(tmp_path) == how


def test_where_a_run_has_lost_its_identity_its_checkpoints_have_it(tmp_path: Path) -> None:
    for step, identity in (("step-00000001", {"parting": WORDS}), ("step-00000002", {"kind": 2})):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "identity.json").write_text(json.dumps(identity))
    assert parting_of(tmp_path) is None
