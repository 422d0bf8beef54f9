"""A whole file as one JSON object: one row, rows under a key, or data-frame columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.formats import REQUIRED, STANDARD
from finetune.data.problems import BadSource
from finetune.text import harmless

_ANEW = 'write one object a line, with pandas: frame.to_json("rows.jsonl", orient="records", lines=True)'


def key_of_rows(fields: Mapping[str, Any], location: str) -> str | None:
    """The key of the only list of rows in it; None where the object is one row. Raises BadSource for other shapes."""
    if shape := _columns(fields):
        raise BadSource(location, f"the file holds {shape}, not rows; {_ANEW}")
    if any(set(parts) <= set(fields) for parts in REQUIRED.values()):
        return None
    keys = [key for key, value in fields.items() if key not in STANDARD and _are_rows(value)]
    if len(keys) > 1:
        names = harmless(", ".join(keys[:6]))
        raise BadSource(location, f"the file holds several lists of rows ({names}); save each in a file of its own")
    return keys[0] if keys else None


def _are_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(element, Mapping) for element in value):
        return False
    turns = ({"role", "content"}, {"from", "value"})  # a conversation under a name of its own is part of a row
    return not any(keys <= set(value[0]) for keys in turns)


def _columns(fields: Mapping[str, Any]) -> str | None:
    """How data frames are written by default, in words; None for anything else."""
    values = list(fields.values())
    if _is_table(values) and not any(set(parts) <= set(fields) for parts in REQUIRED.values()):
        return "names of columns and lists of cells"
    if values and all(isinstance(value, Mapping) and value for value in values):
        inner = set(values[0])
        if _are_numbers(fields) or all(_are_numbers(value) for value in values):
            return "numbered objects" if _are_numbers(fields) else "one object a column"
        return "one object a column" if len(values) > 1 and all(set(value) == inner for value in values) else None
    if values and all(isinstance(value, list) and value for value in values):
        same = len({len(value) for value in values}) == 1
        if same and not any(isinstance(cell, (list, Mapping)) for value in values for cell in value):
            return "one list a column"
    return None


def _is_table(values: Sequence[Any]) -> bool:
    """Whether one value is lists of cells, and another the names of as many columns."""
    lists = [value for value in values if isinstance(value, list) and value]
    widths = {len(value) for value in lists if all(isinstance(cell, str) for cell in value)}
    rows = [value for value in lists if all(isinstance(row, list) for row in value)]
    return any({len(row) for row in value} <= widths for value in rows)


def _are_numbers(keys: Mapping[str, Any]) -> bool:
    return all(key.isdecimal() for key in keys)
