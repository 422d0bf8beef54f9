"""Rows to records: uniform field names, each value validated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.calls import parsed, read_tools
from finetune.data.encoding import check_text
from finetune.data.formats import ANSWER, Layout
from finetune.data.messages import joined, read_messages, without_extras
from finetune.data.rows import Message, Problem, Record, Row

_NOTHING: tuple[Any, ...] = (None, "", [], {})


class BadRow(ValueError):
    """Why a row cannot be trained on; the caller knows its location."""


def read_records(
    rows: Sequence[Row], layout: Layout, labels: Sequence[str] | None = None, reads: Collection[str] | None = None
) -> tuple[list[Record], list[Problem]]:
    """Records of the rows that fit the layout, and the others with the reason.

    labels: those allowed. reads: the parts and columns that reach the text, where not all of the layout's do; a record
    names its other columns as left out.
    """
    records: list[Record] = []
    bad: list[Problem] = []
    parts = (
        layout.columns if reads is None else {part: layout.columns[part] for part in layout.columns if part in reads}
    )
    known = frozenset((*parts.values(), *(reads or ())))
    for row in rows:
        try:
            left_out = [name for name, value in row.fields.items() if name not in known and value not in _NOTHING]
            record = _record(row, layout, labels, left_out)
            if row.rejected is not None:
                worse = _record(replace(row, fields=row.rejected), layout, labels, [])
                record = replace(_last(record), rejected=_last(worse))
            records.append(record)
        except RecursionError:
            bad.append((row.location, "the values are nested too deeply; make them flatter, or remove the row"))
        except ValueError as error:
            bad.append((row.location, str(error)))
    return records, bad


def _last(record: Record) -> Record:
    """With its last answer alone supervised."""
    return replace(record, last_only=bool(record.messages))


def _record(row: Row, layout: Layout, labels: Sequence[str] | None, left_out: list[str]) -> Record:
    missing = [layout.columns[part] for part in layout.required if row.fields.get(layout.columns[part]) is None]
    if missing:
        raise BadRow(f"{', '.join(missing)} is missing, and the other rows are {layout.name}; add it")
    if layout.name in ("chat", "sharegpt"):
        return _conversation(row, layout, left_out)
    return _plain_record(row, layout, labels, left_out)


def _conversation(row: Row, layout: Layout, left_out: list[str]) -> Record:
    part = "messages" if layout.name == "chat" else "conversations"
    if part in layout.columns:
        conversation, column = row.fields[layout.columns[part]], layout.columns[part]
    else:
        asked, answer = (row.fields[layout.columns[name]] for name in layout.required)
        conversation, column = joined(asked, answer), "prompt and completion"
    messages = read_messages(conversation, column, left_out)
    before: list[Message] = []
    if (system := _text(row.fields.get(layout.columns.get("system", "")), "system", "system")).strip():
        if messages[0]["role"] == "system":  # of two the conversation's own counts
            left_out += [layout.columns["system"]] * (messages[0]["content"].strip() != system.strip())
        else:
            before.append({"role": "system", "content": system})
    for asked, answer in _history(row, layout, left_out):
        before += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "weight": 0}]
    if before:
        messages = (*messages[:1], *before, *messages[1:]) if messages[0]["role"] == "system" else (*before, *messages)
    tools = read_tools(row.fields, layout.columns)
    key = repr(tuple(without_extras(messages)))
    return Record(row.location, key, _scalars(row), messages=messages, tools=tools, left_out=tuple(left_out))


def _plain_record(row: Row, layout: Layout, labels: Sequence[str] | None, left_out: list[str]) -> Record:
    columns = {name: "" if value is None else str(value) for name, value in row.fields.items()}
    history = _history(row, layout, left_out) if "history" in layout.columns else ()
    standard = {
        part: _text(row.fields.get(column), column, part)
        for part, column in layout.columns.items()
        if part != "history"
    }
    for part in layout.required:
        if not standard[part].strip():
            raise BadRow(f"{layout.columns[part]} is empty; give it some text, or remove the row")
    answer_part = ANSWER.get(layout.name)
    if answer_part == "label":
        standard["label"] = standard["label"].strip()
        if labels is not None and standard["label"] not in labels:
            raise BadRow(f"label {standard['label']!r} is not one of {', '.join(labels)}; correct it, or add it")
    asked = [text for part, text in standard.items() if part != answer_part and (part != "system" or text)]
    key = "\0".join((*asked, *(said for turn in history for said in turn)))
    if history:
        standard["history"] = "\n".join(said for turn in history for said in turn)
    return Record(
        row.location,
        key,
        {**columns, **standard},
        standard[answer_part] if answer_part else None,
        system=standard.get("system", ""),
        history=history,
        left_out=tuple(left_out),
    )


def _history(row: Row, layout: Layout, left_out: list[str]) -> tuple[tuple[str, str], ...]:
    """Earlier (question, answer) pairs. A column of that name that holds no list is another matter, and left out."""
    column = layout.columns.get("history", "")
    value = row.fields.get(column) or ()
    if isinstance(value, str) and not value.lstrip().startswith("["):
        left_out.append(column)
        return ()
    if isinstance(value, str):
        value = parsed(value, column)
    pairs = []
    for turn in value if isinstance(value, (list, tuple)) else [value]:
        said = tuple(turn.values()) if isinstance(turn, Mapping) else turn
        if not isinstance(said, (list, tuple)) or len(said) != 2 or not all(isinstance(one, str) for one in said):
            raise BadRow(f"{column} must be a list of [question, answer]; fix it")
        for one in said:
            check_text(one, column)
        pairs.append((said[0], said[1]))
    return tuple(pairs)


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
