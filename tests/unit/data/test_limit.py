"""`data.limit`: fewer rows of every split, the same ones for the same seed, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.limit import limit_notes, limited
from finetune.data.prepare import prepare
from finetune.data.rows import Prepared, Record, Split
from finetune.recipe.schema import Recipe
from finetune.report.tables import account_notes
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of


def split(count: int) -> Split:
    return Split("train", count + 2, bad=(("a", "b"), ("c", "d")), records=[Record(f"a:{i}") for i in range(count)])


def drawn(count: int, limit: int | None, seed: int = 0) -> list[int]:
    return [int(one.location[2:]) for one in limited(split(count), limit, seed).records]


def test_rows_are_drawn_from_all_of_the_file_in_its_order() -> None:
    rows = drawn(1000, 100)
    assert len(rows) == 100 and rows == sorted(set(rows))
    assert min(rows) < 100 and max(rows) >= 900
    assert drawn(1000, 100) == rows != drawn(1000, 100, seed=1)
    assert set(drawn(1000, 50)) < set(rows), "a larger limit keeps the rows of a smaller one"
    assert drawn(7, 1) == [1]  # fixed for good: a run that is resumed has the same rows


@pytest.mark.parametrize("limit", [None, 5, 6, 10**9])
def test_no_more_rows_than_that_stay_as_they_are(limit: int | None) -> None:
    assert limited(split(5), limit, 0) == split(5)


def test_bad_rows_are_counted_beside_them() -> None:
    found = limited(split(50), 20, 3)
    assert (found.rows, len(found.records), len(found.bad)) == (22, 20, 2)
    assert found.notes == ("data.limit: 20 of 50 rows drawn (seed 3)",)


def prepared(folder: Path, **data: Any) -> Prepared:
    for name, count in (("train", 60), ("test", 40)):
        rows = [{"text": f"{name} {i}", "label": "rare" if i == 7 else ("good", "bad")[i % 2]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"path": "m"}, "data": {"train": "train.jsonl", **data}}
    return result_of(prepare(Recipe.model_validate(values), byte_level(CHATML), base=folder))


def test_every_split_has_at_most_so_many_rows_and_says_so(tmp_path: Path) -> None:
    whole, found = prepared(tmp_path, test="test.jsonl"), prepared(tmp_path, test="test.jsonl", limit=10)
    assert [len(one.examples) for one in found.splits] == [10, 6, 10]
    for less, more in zip(found.splits, whole.splits, strict=True):
        assert {one.location for one in less.examples} <= {one.location for one in more.examples}
    assert found.labels == whole.labels, "all labels of the file are known, drawn or not"
    assert limit_notes(found) == (
        "train: data.limit: 10 of 54 rows drawn (seed 0)",
        "test: data.limit: 10 of 40 rows drawn (seed 0)",
    )
    assert "train: data.limit: 10 of 54 rows drawn (seed 0)" in account_notes(found)
    assert limit_notes(whole) == ()


def test_rows_set_apart_are_those_of_the_whole_file(tmp_path: Path) -> None:
    whole, found = prepared(tmp_path), prepared(tmp_path, limit=20)
    assert [one.location for one in found.valid.examples] == [one.location for one in whole.valid.examples]
    assert not {one.location for one in found.valid.examples} & {one.location for one in found.train.examples}
