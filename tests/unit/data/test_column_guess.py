"""Columns with other names, told by what they hold; and tables without a line of names."""

from __future__ import annotations

import pytest

from finetune.data.column_guess import by_content, headerless
from finetune.data.formats import recognise
from finetune.data.rows import Row
from finetune.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(columns: dict, count: int = 20) -> list[Row]:
    """columns: name -> what row n holds there."""
    return [Row({name: hold(n) for name, hold in columns.items()}, "f.csv", n + 2) for n in range(count)]


def text(n: int) -> str:
    return f"the tea of day {n} was rather {'bad' if n % 2 else 'good'}"


def label(n: int) -> str:
    return ("bad", "good")[n % 2]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"utterance": text, "intent": label}, {"text": "utterance", "label": "intent"}),
        ({"y": label, "x": text}, {"text": "x", "label": "y"}),
        ({"id": str, "Kommentar": text, "Note": lambda n: n % 3}, {"text": "Kommentar", "label": "Note"}),
        ({"when": lambda n: f"2026-01-{n + 1:02} 10:00", "a": text, "b": label}, {"text": "a", "label": "b"}),
        ({"name": lambda n: f"Anna B{n}", "body": text, "topic": label}, {"text": "body", "label": "topic"}),
        ({"文": lambda n: f"第{n}天的茶非常好喝也很便宜", "类": label}, {"text": "文", "label": "类"}),
        ({"poem": text}, {"text": "poem"}),
        ({"key": lambda n: f"a-{n}", "poem": text}, {"text": "poem"}),
        ({"dialog": lambda n: TURNS}, {"messages": "dialog"}),
        ({"talk": lambda n: [{"from": "human", "value": "a"}], "id": str}, {"conversations": "talk"}),
        # what leaves a doubt
        ({"a": text, "b": lambda n: text(n + 1)}, {}),
        ({"body": text, "topic": label, "language": lambda n: ("de", "fr", "en")[n % 3]}, {}),
        ({"a": str, "b": label}, {}),
        ({"body": lambda n: text(n) if n % 2 else None, "topic": label}, {}),
    ],
)  # fmt: skip
def test_columns_are_told_by_what_they_hold(columns, expected):
    found = rows(columns)
    assert by_content(found) == expected
    if expected:
        assert dict(recognise(found, "auto", expected).columns) == expected


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (("the tea was bad and not worth it", "bad"), (text, label)),
        (("ham", "Go until jurong point, crazy.. Available only in bugis"), (lambda n: ("ham", "spam")[n % 2], text)),
        (("1", "tea"), (lambda n: str(n % 2), text)),
        (("it was rather good and also cheap", "so it was on that day"), (text, text)),
    ],
)
def test_a_table_without_a_line_of_names_is_reported(names, holds):
    found = rows(dict(zip(names, holds, strict=True)))
    with pytest.raises(DataError, match=r"f\.csv:1: the first line .* is a row and not the names") as caught:
        recognise(found)
    assert "put a line of names before it" in str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"utterance": text, "intent": label},
        {"What did you think of the tea?": text, "And would you come to us again?": label},
        {"The whole text of the customer's note": text, "k": label},
    ],
)
def test_names_are_not_taken_for_a_row(columns):
    assert headerless(rows(columns)) is None


def test_keys_of_json_are_never_taken_for_a_row():
    assert headerless([Row({"good": "good", "bad": "tea"}, "f.jsonl", n) for n in range(9)]) is None
