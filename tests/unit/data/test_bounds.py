"""Rows that nobody means: too long, of too many columns, with dates that no calendar has. Read in linear time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.data import read as reading
from finetune.data.problems import BadSource
from finetune.data.read import read
from finetune.data.rows import Rows

MANY = 60_000
SECONDS = 5.0  # of processor time; a quadratic reading takes minutes


def rows_of(tmp_path: Path, name: str, text: str) -> Rows:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read(name, tmp_path)


@pytest.mark.parametrize("last", ["k0", "k59999", "other"])
def test_many_columns_are_read_in_linear_time(tmp_path: Path, last: str) -> None:
    names = [*(f"k{i}" for i in range(MANY)), last]
    began = time.process_time()
    text = f"{','.join(names)}\n{','.join('1' for _ in names)}\n"
    if last == "other":
        assert len(rows_of(tmp_path, "a.csv", text).rows[0].fields) == MANY + 1
    else:
        with pytest.raises(BadSource, match=f"columns {last} occur twice"):
            rows_of(tmp_path, "a.csv", text)
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("last", ["k0", "k59999"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_many_keys_are_read_in_linear_time(tmp_path: Path, last: str, name: str) -> None:
    row = "{" + ",".join(f'"k{i}": 1' for i in range(MANY)) + f', "{last}": 2}}'
    began = time.process_time()
    if name == "a.jsonl":
        assert rows_of(tmp_path, name, f"{row}\n" + '{"k": 1}\n').bad == [
            ("a.jsonl:1", f"the key {last} stands twice; keep one of them")
        ]
    else:
        with pytest.raises(BadSource, match=f"the key {last} stands twice"):
            rows_of(tmp_path, name, f"[{row}]")
    assert time.process_time() - began < SECONDS


LONG: dict[str, Any] = {
    "a text": {"text": "x" * 2000},
    "a list": {"messages": [{"role": "user", "content": "y" * 30} for _ in range(60)]},
    "keys": {f"key{i}": 1 for i in range(300)},
    "nested": {"text": {"a": {"b": ["z" * 500, "z" * 600]}}},
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr(reading, "MOST_ROW", 1000)
    rows = [{"text": "a"}, LONG[kind], {"text": "b"}]
    text = json.dumps(rows) if name == "a.json" else "".join(f"{json.dumps(row)}\n" for row in rows)
    found = rows_of(tmp_path, name, text)
    assert [row.fields for row in found.rows] == [{"text": "a"}, {"text": "b"}]
    ((location, reason),) = found.bad
    assert location == f"a.json{'l:2' if name == 'a.jsonl' else ':1'}"
    assert "characters in one row, and 1,000 are the most; write it as several rows" in reason


def test_a_long_cell_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_ROW", 1000)
    found = rows_of(tmp_path, "a.csv", f"text,label\na,b\n{'x' * 2000},c\nd,e\n")
    assert [row.fields["text"] for row in found.rows] == ["a", "d"]
    assert [location for location, _ in found.bad] == ["a.csv:3"]


def test_a_long_file_of_short_rows_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_ROW", 1000)
    found = rows_of(tmp_path, "a.jsonl", '{"text": "abc"}\n' * 500)
    assert (len(found.rows), found.bad) == (500, [])


def _arrow(kind: str) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    numbers = pa.array([1, 10**9, 3], pa.int32()) if kind == "date32" else pa.array([1, 2**62, 3], pa.int64())
    made = {
        "date32": lambda: numbers.cast(pa.date32()),
        "date64": lambda: pa.array([86_400_000, 86_400_000 * 10**10, 86_400_000], pa.int64()).cast(pa.date64()),
        "timestamp": lambda: numbers.cast(pa.timestamp("us")),
        "timestamp with a zone": lambda: numbers.cast(pa.timestamp("ms", "Europe/Berlin")),
        "duration": lambda: numbers.cast(pa.duration("s")),
        "in a list": lambda: pa.ListArray.from_arrays(
            pa.array([0, 1, 2, 3], pa.int32()), numbers.cast(pa.duration("s"))
        ),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["date32", "date64", "timestamp", "timestamp with a zone", "duration", "in a list"])
def test_a_time_that_no_calendar_has_is_a_bad_row(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table  # type: ignore[import-untyped]

    write_table(pa.table({"text": ["a", "b", "c"], "when": _arrow(kind)}), tmp_path / "a.parquet")
    found = read("a.parquet", tmp_path)
    assert [(row.location, row.fields["text"]) for row in found.rows] == [("a.parquet:1", "a"), ("a.parquet:3", "c")]
    ((location, reason),) = found.bad
    assert location == "a.parquet:2"
    assert "out of range" in reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_a_pipe_is_no_file_of_rows(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadSource, match="not an ordinary file"):
        read(name, tmp_path)
