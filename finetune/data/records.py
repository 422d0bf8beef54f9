"""Rows to records: the same fields whatever the file called them, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.conversations import Message, read_messages, read_tools
from finetune.data.encoding import check_text
from finetune.data.formats import ANSWER, REQUIRED, Layout
from finetune.data.problems import Problem
from finetune.data.rows import Row


class BadRow(ValueError):
    """Why a row cannot be trained on; the caller knows its place."""


@dataclass(frozen=True)
class Record:
    """One row, ready to be written as text."""

    place: str
    key: str = ""  # records of the same key ask the same thing, and stay on one side of a split
    values: Mapping[str, str] = field(default_factory=dict)  # by standard name and by the file's own
    answer: str | None = None  # the label, completion or output
    messages: tuple[Message, ...] = ()  # chat and sharegpt
    tools: tuple[Any, ...] = ()
    last_only: bool = False  # only the last assistant turn is supervised


def read_records(
    rows: Sequence[Row], layout: Layout, labels: Sequence[str] | None = None
) -> tuple[list[Record], list[Problem]]:
    """Records of the rows that fit the layout, and the others with the reason. labels: those allowed."""
    records: list[Record] = []
    bad: list[Problem] = []
    for row in rows:
        try:
            records.append(_record(row, layout, labels))
        except ValueError as error:
            bad.append((row.place, str(error)))
    return records, bad


def _record(row: Row, layout: Layout, labels: Sequence[str] | None) -> Record:
    missing = [layout.columns[part] for part in REQUIRED[layout.name] if row.fields.get(layout.columns[part]) is None]
    if missing:
        raise BadRow(f"{', '.join(missing)} is missing, and the other rows are {layout.name}; add it")
    if layout.name in ("chat", "sharegpt"):
        part = "messages" if layout.name == "chat" else "conversations"
        messages = read_messages(row.fields[layout.columns[part]], layout.columns[part])
        tools = read_tools(row.fields, layout.columns)
        return Record(row.place, repr(messages), _scalars(row), messages=messages, tools=tools)
    return _plain_record(row, layout, labels)


def _plain_record(row: Row, layout: Layout, labels: Sequence[str] | None) -> Record:
    own = {name: "" if value is None else str(value) for name, value in row.fields.items()}
    standard = {part: _text(row.fields.get(column), column, part) for part, column in layout.columns.items()}
    for part in REQUIRED[layout.name]:
        if not standard[part].strip():
            raise BadRow(f"{layout.columns[part]} is empty; give it some text, or remove the row")
    answer_part = ANSWER.get(layout.name)
    if answer_part == "label":
        standard["label"] = standard["label"].strip()
        if labels is not None and standard["label"] not in labels:
            raise BadRow(f"label {standard['label']!r} is not one of {', '.join(labels)}; correct it, or add it")
    key = "\0".join(standard[part] for part in standard if part != answer_part)
    return Record(row.place, key, {**own, **standard}, standard[answer_part] if answer_part else None)


def _scalars(row: Row) -> dict[str, str]:
    """The columns beside a conversation that hold one value: an id, a source, a group."""
    return {name: str(value) for name, value in row.fields.items() if isinstance(value, (str, int, float))}


def _text(value: Any, column: str, part: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and part == "label":
        return str(int(value))  # tables with gaps hold whole numbers as floats
    if isinstance(value, str):
        check_text(value, column)
        return value
    if isinstance(value, (bool, int)) and part in ("label", "completion", "output"):
        return str(value)
    kinds = "text, a whole number or true/false" if part == "label" else "text"
    raise BadRow(f"{column} is {type(value).__name__}, and must be {kinds}; write it as text")
