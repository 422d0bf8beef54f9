"""Folders and patterns as sources: which files, in which order, for which split."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table
from toy_tokenizers import byte_level

from finetune.data.prepare import prepare
from finetune.data.read import read
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of


def fill(folder: Path, **counts: int) -> None:
    """Files of so many rows; `__` in a name stands for a dot, `_of_` for a dash."""
    for name, count in counts.items():
        file = folder / name.replace("__", ".").replace("_of_", "-")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{file.stem} {n}", "label": ("good", "bad")[n % 2]} for n in range(count)]
        if file.suffix == ".parquet":
            write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def splits(folder: Path, **data: str) -> dict[str, int]:
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows", **data}})
    found = result_of(prepare(recipe, byte_level(), base=folder))
    return {split.name: split.rows for split in found.splits}


def error(source: str, base: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read(source, base, split)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train__jsonl": 20, "valid__jsonl": 4, "test__jsonl": 6}, {"train": 20, "valid": 4, "test": 6}),  # mlx-lm
        ({"train__jsonl": 20, "test__jsonl": 6}, {"train": 18, "valid": 2, "test": 6}),
        ({"my-train__jsonl": 20, "my-dev__jsonl": 4}, {"train": 20, "valid": 4}),
        ({"a__jsonl": 8, "b__jsonl": 12}, {"train": 18, "valid": 2}),
        (
            {"train_of_00000_of_of_of_00001__parquet": 20, "validation_of_00000__parquet": 4},
            {"train": 20, "valid": 4},
        ),
    ],
)
def test_a_folder_gives_its_splits_by_the_names_of_its_files(tmp_path, files, expected):
    fill(tmp_path / "rows", **files)
    assert splits(tmp_path) == expected


def test_a_folder_of_the_hub_has_its_shards_in_data_or_in_folders_of_splits(tmp_path):
    fill(tmp_path / "rows" / "data", **{f"train-0000{n}-of-00003__parquet": 8 for n in range(3)})
    fill(tmp_path / "rows" / "data", **{"test-00000-of-00001__parquet": 4})
    (tmp_path / "rows" / "README.md").write_text("about it")
    (tmp_path / "rows" / "dataset_infos.json").write_text("{}")
    assert splits(tmp_path) == {"train": 22, "valid": 2, "test": 4}
    fill(tmp_path / "other" / "train", part1__jsonl=10, part2__jsonl=10)
    fill(tmp_path / "other" / "validation", part1__jsonl=4)
    assert splits(tmp_path, train="other") == {"train": 20, "valid": 4}


def test_what_the_recipe_names_goes_before_the_folder(tmp_path):
    fill(tmp_path / "rows", train__jsonl=20, valid__jsonl=4, test__jsonl=6)
    fill(tmp_path, own__jsonl=2)
    assert splits(tmp_path, valid="own.jsonl") == {"train": 20, "valid": 2, "test": 6}
    assert splits(tmp_path, train="rows/train.jsonl") == {"train": 18, "valid": 2}
    assert splits(tmp_path, train="rows/train.jsonl", valid="rows", test="rows:valid") == {
        "train": 20,
        "valid": 4,
        "test": 4,
    }


def test_a_pattern_gives_its_files_in_order_each_row_with_its_own_file_and_line(tmp_path):
    fill(tmp_path / "[x]", **{"b__jsonl": 2, "a__jsonl": 1, "c__csv": 0, ".hidden__jsonl": 3})
    fill(tmp_path / "[x]" / "deep", d__jsonl=1)
    found = read("[x]/*.jsonl", tmp_path)
    assert [row.location for row in found.rows] == ["[x]/a.jsonl:1", "[x]/b.jsonl:1", "[x]/b.jsonl:2"]
    assert "2 files" in found.notes[0]
    assert [row.file for row in read("[x]/[ab].jsonl", tmp_path).rows] == ["[x]/a.jsonl", *["[x]/b.jsonl"] * 2]
    assert len(read(str(tmp_path / "[x]" / "**" / "?.jsonl"), Path("/")).rows) == 4
    (tmp_path / "[x]" / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert [where for where, _ in read("[x]/*.jsonl", tmp_path).bad] == ["[x]/b.jsonl:2"]


def test_what_a_folder_cannot_give_is_said(tmp_path):
    fill(tmp_path / "valid", valid__jsonl=2)
    fill(tmp_path / "both", train__jsonl=2, train__csv=1, other__jsonl=1)
    fill(tmp_path / "more", train__jsonl=2, notes__jsonl=1)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").touch()
    (tmp_path / "saved" / "state.json").touch()
    assert "has rows for valid, and none for train" in error("valid", tmp_path)
    assert "train rows in several forms (train.csv, train.jsonl)" in error("both", tmp_path)
    assert "load_from_disk" in error("saved", tmp_path)
    assert "no file fits the pattern" in error("both/*.parquet", tmp_path)
    assert "no split is called nothing" in error("more:nothing", tmp_path)
    assert "left out, as their names tell no split: notes.jsonl" in read("more", tmp_path).notes[0]


def test_a_backslash_and_an_address_get_their_remedy(tmp_path):
    fill(tmp_path / "rows", train__jsonl=2)
    assert f"write slashes: {tmp_path}/rows/train.jsonl" in error("rows\\train.jsonl", tmp_path)
    assert "write acme/set" in error("https://huggingface.co/datasets/acme/set", tmp_path)
    assert "download the file" in error("https://example.org/rows.csv", tmp_path)
    assert error("x" * 300 + ".csv", tmp_path)
