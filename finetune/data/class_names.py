"""Class names stored beside integer labels in Parquet files and hub data sets, used as the labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.text import harmless, shorten

Names = Mapping[str, Sequence[str]]  # column -> the name of class 0, of class 1, ...


def names_in_schema(metadata: Mapping[bytes, bytes] | None) -> Names:
    """Of a Parquet file that the library datasets wrote."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        columns = {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {column: names for column, names in columns.items() if _are_names(names)}


def names_of(features: Any) -> Names:
    """Of a data set of the library datasets; `features` may be None."""
    columns: dict[str, Any] = {column: getattr(kind, "names", None) for column, kind in (features or {}).items()}
    return {column: names for column, names in columns.items() if _are_names(names)}


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def named(records: Iterable[Mapping[str, Any]], names: Names) -> Iterator[Mapping[str, Any]]:
    """The records with the name of each class for its number; -1 is a row without a label."""
    if not names:
        yield from records
        return
    for record in records:
        yield {**record, **{column: _name(record.get(column), of) for column, of in names.items() if column in record}}


def _name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def class_notes(names: Names) -> list[str]:
    return [f"{harmless(column)}: names of classes ({shorten(', '.join(of), 60)})" for column, of in names.items()]
