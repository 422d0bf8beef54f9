"""Names of classes in Parquet files and hub data sets are the labels."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from finetune.data.read import read
from finetune.data.rows import Rows

NUMBERS = [0, 1, 1, -1, None, 7]
EXPECTED = ["bad", "good", "good", None, None, 7]  # -1 is a row without a label; 7 has no name, and stays


def from_parquet(folder: Any, features: Any, columns: dict | None = None) -> Rows:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns or {"label": NUMBERS}).replace_schema_metadata(metadata)
    write_table(table, folder / "rows.parquet")
    return read("rows.parquet", folder)


def test_names_of_a_parquet_file_are_the_labels(tmp_path):
    found = from_parquet(tmp_path, {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}})
    assert [row.fields["label"] for row in found.rows] == EXPECTED
    assert found.notes == ("rows.parquet: label: names of classes (bad, good)",)


def test_names_that_the_library_writes_are_read(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "k": ClassLabel(names=["no", "yes"]), "n": Value("int64")})
    data = Dataset.from_dict({"text": ["a", "b"], "k": [1, 0], "n": [0, 1]}, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    found = read("rows.parquet", tmp_path)
    assert [(row.fields["k"], row.fields["n"]) for row in found.rows] == [("yes", 0), ("no", 1)]


def test_names_of_a_hub_data_set_are_the_labels(tmp_path, monkeypatch):
    class Data(list):
        features = types.MappingProxyType(
            {"label": types.SimpleNamespace(names=["bad", "good"]), "text": types.SimpleNamespace(dtype="string")}
        )

    data = Data({"text": "a", "label": number} for number in NUMBERS)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: data))
    found = read("acme/support-v1.5", tmp_path)
    assert [row.fields["label"] for row in found.rows] == EXPECTED
    assert "names of classes (bad, good)" in found.notes[0]


@pytest.mark.parametrize(
    "features",
    [
        {"label": {"dtype": "int64", "_type": "Value"}},
        {"label": {"names": None, "_type": "ClassLabel"}},
        {"label": {"names": [1, 2], "_type": "ClassLabel"}},
        {"label": "ClassLabel"},
        {"other": {"names": ["bad", "good"], "_type": "ClassLabel"}},
        None,
    ],
)
def test_without_names_the_numbers_stay(tmp_path, features):
    assert [row.fields["label"] for row in from_parquet(tmp_path, features).rows] == NUMBERS
