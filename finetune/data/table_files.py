"""CSV and TSV files to rows, every row with the line it begins on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from finetune.data.encoding import harmless, refuse_bad_bytes
from finetune.data.problems import Problem
from finetune.data.rows import Row
from finetune.errors import DataError

_CELL_LIMIT = 2**31 - 1  # the largest that every platform's csv module takes


def parse_table(text: str, file: str, delimiter: str) -> tuple[list[Row], list[Problem], list[str]]:
    """CSV or TSV with a header line. Returns rows, bad rows and notes."""
    refuse_bad_bytes(text, file)
    try:
        return (*_table(text, file, delimiter, csv.QUOTE_MINIMAL), [])
    except DataError:
        if delimiter != "\t":
            raise
    note = "quotation marks do not pair as in CSV and were taken as ordinary text"
    return (*_table(text, file, delimiter, csv.QUOTE_NONE), [note])


def _table(text: str, file: str, delimiter: str, quoting: Any) -> tuple[list[Row], list[Problem]]:
    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        records = _records(text, file, delimiter, quoting)
        header = _header(records, file)
        rows: list[Row] = []
        bad: list[Problem] = []
        for cells, line in records:
            if len(cells) == len(header):
                rows.append(Row(dict(zip(header, cells, strict=True)), file, line))
            else:
                reason = f"{len(cells)} cells, and the header has {len(header)}; put text with commas in double quotes"
                bad.append((f"{file}:{line}", reason))
    finally:
        csv.field_size_limit(limit)
    return rows, bad


def _records(text: str, file: str, delimiter: str, quoting: Any) -> Iterator[tuple[list[str], int]]:
    """Non-blank records and the line each begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}:{line}: {error}; a quotation mark inside a quoted cell is written twice") from None
        if cells:
            yield cells, line


def _header(records: Iterator[tuple[list[str], int]], file: str) -> list[str]:
    cells, line = next(records, ([], 1))
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise DataError(f"{file}:{line}: the file is empty; its first line must name the columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = (
            f"columns {harmless(', '.join(twice))} occur twice" if twice and twice != [""] else "a column has no name"
        )
        raise DataError(f"{file}:{line}: {what}; the first line must name every column once")
    return names
