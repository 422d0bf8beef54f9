"""CSV and similar files to rows: delimiter detection, unnamed columns, and files joined together."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row
from finetune.text import harmless, shorten

Cells = tuple[list[str], int]  # of one record, and the line it begins on
_CELL_LIMIT = 2**31 - 1  # the largest that every platform's csv module takes
_NAMES = {",": "commas", ";": "semicolons (;)", "\t": "tabs", "|": "bars (|)"}
_SEP = re.compile(r'"?sep=([^\r\n"\w])"?[ \t]*\r?\n', re.IGNORECASE)  # Excel's own word for the delimiter


@dataclass
class Table:
    """What one way of reading a table gave."""

    header: list[str]
    line: int  # of the header
    records: list[Cells] = field(default_factory=list)  # as long as the header
    bad: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_table(text: str, file: str, delimiter: str) -> tuple[list[Row], list[Problem], list[str]]:
    """A table whose first line names its columns. Returns rows, bad rows and notes.

    delimiter: the one that the file's name promises; another one is taken where it fits and this one does not.
    """
    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        declared = _SEP.match(text)
        if declared:
            table = _read(text[declared.end() :], file, declared[1], first=2)
            table.notes.insert(0, f"cells separated by {_NAMES.get(declared[1], declared[1])}, as its first line says")
        else:
            table = _best(text, file, delimiter)
    finally:
        csv.field_size_limit(limit)
    names, kept = _columns(table, file)
    rows = [Row(dict(zip(names, [cells[i] for i in kept], strict=True)), file, line) for cells, line in table.records]
    return rows, table.bad, table.notes


def _best(text: str, file: str, promised: str) -> Table:
    """The table read with the delimiter that leaves the fewest bad rows; the promised one where others do no better.

    One column is a reading of last resort: it fits nearly any text.
    """
    first = text.lstrip("\r\n").split("\n", 1)[0]
    candidates = [promised, *(other for other in _NAMES if other != promised and other in first)]
    found: list[tuple[float, int, Table]] = []
    failed: BadSource | None = None
    for order, delimiter in enumerate(candidates):
        try:
            table = _read(text, file, delimiter)
        except BadSource as error:
            failed = failed or error
            continue
        rows = len(table.records) + len(table.bad)
        single = len(table.header) < 2 and len(candidates) > 1
        found.append((max(len(table.bad), rows / 2 + 0.5) if single else len(table.bad), order, table))
    if not found:
        assert failed is not None
        raise failed
    _, order, table = min(found, key=lambda entry: entry[:2])
    if order:
        table.notes.insert(0, f"cells separated by {_NAMES[candidates[order]]}")
    return table


def _read(text: str, file: str, delimiter: str, first: int = 1) -> Table:
    """The table with this delimiter. first: the line that the text begins on. Raises BadSource."""
    try:
        return _aligned(_records(text, file, delimiter, csv.QUOTE_MINIMAL, first), file)
    except BadSource:
        if delimiter != "\t":
            raise
    table = _aligned(_records(text, file, delimiter, csv.QUOTE_NONE, first), file)
    table.notes.append("quotation marks do not pair as in CSV and were taken as ordinary text")
    return table


def _records(text: str, file: str, delimiter: str, quoting: Any, first: int) -> Iterator[Cells]:
    """Non-blank records and the line each begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + first
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"{error}; a quotation mark inside a quoted cell is written twice"
            raise BadSource(f"{file}:{line}", reason) from None
        if cells:
            yield cells, line


def _aligned(records: Iterator[Cells], file: str) -> Table:
    """The records that have a cell for each column, or can be given one without guessing."""
    cells, line = next(records, ([], 1))
    table = Table([cell.strip() for cell in cells], line)
    if not any(table.header):
        raise BadSource(f"{file}:{line}", "the file is empty; its first line must name the columns")
    rest = list(records)
    if rest and all(len(cells) == len(table.header) + 1 and cells[0].strip().isdecimal() for cells, _ in rest):
        table.header.insert(0, "")  # R's write.table numbers the rows and gives that column no name
    width, named = len(table.header), _named(table.header)
    again = longer = blank = 0
    for cells, line in rest:
        if not any(cell.strip() for cell in cells):
            blank += 1
            continue
        fitted = cells[:width] if not any(cell.strip() for cell in cells[width:]) else cells
        longer += len(cells) > len(fitted)
        if named <= len(fitted) < width:  # Excel leaves empty cells at a line's end out
            fitted = [*fitted, *[""] * (width - len(fitted))]
        if width > 1 and [cell.strip() for cell in fitted] == table.header:
            again += 1
        elif len(fitted) == width:
            table.records.append((fitted, line))
        else:
            reason = f"{len(cells)} cells, and the header has {width}; put text with the delimiter in double quotes"
            table.bad.append((f"{file}:{line}", reason))
    if again:
        table.notes.append(f"the line that names the columns stands {again} more times, and was left out there")
    if blank:
        table.notes.append(f"{blank} lines of empty cells left out")
    if longer:
        table.notes.append(f"{longer} rows: empty cells after the last column left out")
    return table


def _named(header: Sequence[str]) -> int:
    """Columns up to the last that has a name."""
    return max(i for i, name in enumerate(header, 1) if name)


def _columns(table: Table, file: str) -> tuple[list[str], list[int]]:
    """The names of the columns that are kept, and which they are. Raises BadSource where names do not serve."""
    twice = sorted(name for name, count in Counter(table.header).items() if name and count > 1)
    if twice:
        reason = f"columns {harmless(', '.join(twice))} occur twice; the first line must name every column once"
        raise BadSource(f"{file}:{table.line}", reason)
    left_out = {"empty": 0, "numbering": 0}
    kept = []
    for i, name in enumerate(table.header):
        if name:
            kept.append(i)
            continue
        values = [cells[i].strip() for cells, _ in table.records]
        kind = "empty" if not any(values) else "numbering" if _numbers_rows(values, first=i == 0) else None
        if kind is None:
            shown = shorten(next(value for value in values if value), 40)
            raise BadSource(
                f"{file}:{table.line}",
                f"column {i + 1} has no name, and holds {shown!r}; name it in the first line, or where pandas wrote "
                "the file, write it with to_csv(index=False)",
            )
        left_out[kind] += 1
    if left_out["empty"]:
        table.notes.append(f"{left_out['empty']} empty columns without a name left out")
    if left_out["numbering"]:
        table.notes.append("a column without a name that numbers the rows left out (pandas: to_csv(index=False))")
    return [table.header[i] for i in kept], kept


def _numbers_rows(values: Sequence[str], first: bool) -> bool:
    """Whether whole numbers count the rows, or as a data frame's first column tell each row from the others.

    They may begin anew, where frames were put together; labels of 0 and 1 do so far more often.
    """
    if not all(value.isdecimal() and len(value) < 19 for value in values) or (len(values) < 3 and not first):
        return False
    numbers = [int(value) for value in values]
    if first and len(values) > 2 and len(set(numbers)) == len(values):
        return True
    steps = [b == a + 1 for a, b in pairwise(numbers)]
    return numbers[0] in (0, 1) and sum(steps) >= 0.9 * len(steps)
