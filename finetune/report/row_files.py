"""Writes rows as JSON Lines or as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError

_ENDINGS = (".jsonl", ".csv")


def check_output(output: Path, force: bool, source: Path | None) -> None:
    """Raises RecipeError where rows cannot be, or may not be, written. source: the file whose rows are read."""
    if output.suffix.lower() not in _ENDINGS:
        raise RecipeError(f"--output {output}: the ending must be {' or '.join(_ENDINGS)}")
    if output.is_dir():
        raise RecipeError(f"--output {output}: is a folder; name a file")
    if source is not None and output.exists() and source.exists() and output.samefile(source):
        raise RecipeError(f"--output {output}: is the file whose rows are read; give another name")
    if output.exists() and not force:
        raise RecipeError(f"{output}: exists already; give another name with --output, or --force to replace it")


def is_table(output: Path) -> bool:
    return output.suffix.lower() == ".csv"


def as_text(output: Path, lines: Sequence[Mapping[str, Any]], last: Sequence[str] = ()) -> str:
    """In the form that the file's ending names. last: columns of a table that stand after all others."""
    return _as_csv(lines, last) if is_table(output) else _as_json_lines(lines)


def _as_json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def _as_csv(lines: Sequence[Mapping[str, Any]], last: Sequence[str]) -> str:
    """Cells as they are; a list or an object is JSON in its cell."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    names = [*(name for name in names if name not in last), *(name for name in names if name in last)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(line.get(name)) for name in names] for line in lines)
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str) or value is None:
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
