"""JSON files that are one object: rows under a key, one row, or columns as data frames write them."""

from __future__ import annotations

import json

import pytest

from finetune.data.json_files import parse_json
from finetune.errors import DataError

ROWS = [{"text": "warm", "label": "good"}, {"text": "cold", "label": "bad"}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "whole",
    [
        {"version": "1", "data": ROWS},
        {"data": ROWS, "count": 2, "by": {"name": "x"}, "tags": ["a", "b"]},
        {"rows": ROWS},
        {"schema": {"fields": []}, "data": ROWS},  # pandas, orient="table"
    ],
)
def test_rows_under_one_key_are_the_rows(whole, indent):
    rows, bad, notes = parse_json(json.dumps(whole, indent=indent), "f.json")
    assert [row.fields for row in rows] == ROWS
    assert not bad
    assert "rows under the key" in notes[0]


def test_rows_under_a_key_have_their_own_lines():
    rows, _, _ = parse_json('{\n "name": "data",\n "data": [\n  {"text": "a"},\n\n  {"text": "b"}\n ]\n}', "f.json")
    assert [row.line for row in rows] == [4, 6]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS, "tools": [{"type": "function"}]},
        {"text": "a", "label": "b", "spans": [{"start": 1}]},
        {"dialog": TURNS},
        {"turns": [{"from": "human", "value": "a"}], "id": 3},
        {"text": "a"},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_stays_one_row(row, indent):
    rows, _, _ = parse_json(json.dumps(row, indent=indent), "f.jsonl")
    assert [found.fields for found in rows] == [row]


def test_objects_on_lines_of_their_own_stay_rows():
    row = {"data": ROWS}
    rows, _, _ = parse_json("\n".join([json.dumps(row)] * 2), "f.jsonl")
    assert [found.fields for found in rows] == [row, row]


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ({"text": {"0": "warm", "1": "cold"}, "label": {"0": "good", "1": "bad"}}, "one object a column"),  # to_json()
        ({"text": {"0": "warm"}}, "one object a column"),
        ({"text": {"a": "warm", "b": "cold"}, "label": {"a": "good", "b": "bad"}}, "one object a column"),
        ({"0": ROWS[0], "1": ROWS[1]}, "numbered objects"),  # orient="index"
        ({"text": ["warm", "cold"], "label": ["good", "bad"]}, "one list a column"),  # to_dict("list")
        ({"text": ["warm", "cold"], "label": [1, None]}, "one list a column"),
        ({"columns": ["text"], "index": [0], "data": [["warm"]]}, "names of columns"),  # orient="split"
        ({"columns": ["text"], "data": [["warm"]], "source": "a survey", "total": 1}, "names of columns"),
        ({"header": ["text", "label"], "rows": [["warm", "good"], ["cold", "bad"]]}, "names of columns"),
        ({"meta": {"view": 1}, "fields": ["text", "n"], "values": [["warm", 1]]}, "names of columns"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_columns_are_named_for_what_they_are(whole, said, indent):
    with pytest.raises(DataError) as caught:
        parse_json(json.dumps(whole, indent=indent), "f.json")
    assert said in str(caught.value)
    assert 'orient="records", lines=True' in str(caught.value)


def test_several_lists_are_not_guessed_from():
    with pytest.raises(DataError, match=r"several lists of rows \(train, test\)"):
        parse_json(json.dumps({"train": ROWS, "test": ROWS}), "f.json")


def test_lists_within_a_row_are_no_table():
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]], "tags": ["e", "f"]}
    rows, bad, _ = parse_json(json.dumps(row), "f.json")
    assert [dict(one.fields) for one in rows] == [row] and not bad
