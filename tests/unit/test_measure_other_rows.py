"""Other rows are measured in the labels and the format of a run, and its training file is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Prepared
from finetune.disk.run_folder import RunFolder
from finetune.errors import DataError
from finetune.evaluation.baselines import bag_of_words
from finetune.recipe.schema import Recipe
from finetune.report.summary import account_of
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of

Rows = list[dict[str, Any]]
REVIEWS: Rows = [{"text": f"film {i}", "label": ("good", "bad", "2")[i % 3]} for i in range(9)]
OTHER: Rows = [{"text": f"other {i}", "label": ("bad", "good")[i % 2]} for i in range(4)]  # never "2", in another order


def write(folder: Path, name: str, rows: Rows) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def trained(folder: Path, rows: Rows, **more: Any) -> tuple[Recipe, Prepared]:
    values = {"model": {"path": "m"}, "data": {"train": write(folder, "train.jsonl", rows)}, **more}
    recipe = Recipe.model_validate(values)
    found = result_of(prepare(recipe, byte_level(CHATML), base=folder))
    data = recipe.data.model_copy(update={"format": found.format})
    RunFolder(folder).write_json("data.json", account_of(found))
    (folder / "train.jsonl").unlink()
    return recipe.model_copy(update={"data": data, "task": found.task}), found


def measured(folder: Path, recipe: Recipe, source: str) -> Prepared:
    data = recipe.data.model_copy(update={"test": source})
    labels = RunFolder(folder).labels()
    found = result_of(prepare(recipe.model_copy(update={"data": data}), byte_level(CHATML), folder, labels=labels))
    refuse(found, recipe)
    return found


def talk(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"film {i}"}, {"role": "assistant", "content": "good"}]}


@pytest.mark.parametrize(
    ("rows", "other", "more"),
    [
        (REVIEWS, OTHER, {}),
        (REVIEWS, OTHER, {"prompt": {"template": "chat"}}),
        ([talk(i) for i in range(6)], [talk(i) for i in range(20, 23)], {}),
        ([{"prompt": f"q {i}", "completion": "a"} for i in range(6)], [{"prompt": "x", "completion": "b"}], {}),
        ([{"text": f"film {i}"} for i in range(6)], [{"text": "a film"}], {}),
    ],
)
def test_they_are_prepared_as_beside_the_training_rows(
    tmp_path: Path, rows: Rows, other: Rows, more: dict[str, Any]
) -> None:
    source = write(tmp_path, "other.jsonl", other)
    recipe, before = trained(tmp_path, rows, **more)
    found = measured(tmp_path, recipe, source)
    write(tmp_path, "train.jsonl", rows)
    data = recipe.data.model_copy(update={"test": source})
    beside = result_of(prepare(recipe.model_copy(update={"data": data}), byte_level(CHATML), tmp_path)).held_out
    assert (found.labels, found.label_tokens) == (before.labels, before.label_tokens)
    assert (found.task, found.format, found.template) == (before.task, before.format, before.template)
    assert len(found.held_out.examples) == len(other)
    for one, two in zip(found.held_out.examples, beside.examples, strict=True):
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.weights, two.weights)
        assert (one.answer, one.location) == (two.answer, two.location)
    assert bag_of_words(found) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([{"text": "x", "label": "awful"}], "label 'awful' does not occur in the training rows"),
        ([{"text": "x"}], "do not fit data.format classification"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(tmp_path: Path, other: Rows, words: str) -> None:
    source = write(tmp_path, "other.jsonl", other)
    recipe, _ = trained(tmp_path, REVIEWS)
    with pytest.raises(DataError, match=rf"other\.jsonl:1: .*{words}"):
        measured(tmp_path, recipe, source)


def test_spellings_are_those_of_the_run(tmp_path: Path) -> None:
    source = write(tmp_path, "other.jsonl", [{"text": "x", "label": " good\u200b"}, {"text": "y", "label": "bad"}])
    recipe, _ = trained(tmp_path, REVIEWS)
    assert [one.answer for one in measured(tmp_path, recipe, source).held_out.examples] == ["good", "bad"]


def test_a_folder_gives_its_test_rows(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "train.jsonl", REVIEWS)
    write(tmp_path / "more", "test.jsonl", OTHER[:3])
    recipe, _ = trained(tmp_path, REVIEWS)
    assert len(measured(tmp_path, recipe, "more").held_out.examples) == 3
