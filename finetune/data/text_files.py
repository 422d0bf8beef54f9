"""JSON and CSV files to rows, every row with the line it begins on."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from finetune.data.problems import Problem
from finetune.errors import DataError
from finetune.examples import Row

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CELL_LIMIT = 2**31 - 1  # the largest that every platform's csv module takes
_WHITE = " \t\r\n"


def decode(raw: bytes, file: str) -> str:
    """UTF-8 text without its byte order mark. Raises DataError for any other encoding."""
    if raw.startswith(_UTF16) or (b"\x00" in raw[:64] and raw[:64].count(b"\x00") * 3 >= len(raw[:64])):
        raise DataError(f"{file}:1: the file is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8 (for Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def parse_json(text: str, file: str) -> tuple[list[Row], list[Problem]]:
    """JSON Lines, one array, or objects one after the other, told apart by their content."""
    start = _skip(text, 0)
    if start == len(text):
        return [], []
    if text[start] == "[" and not _is_line_of_values(text, start):
        return _collect(_array(text, start + 1, file), file)
    if _spans_lines(text, start):
        return _collect(_stream(text, start, file), file)
    return _lines(text, file)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _WHITE:
        at += 1
    return at


def _is_line_of_values(text: str, start: int) -> bool:
    """Whether the first line is an array of its own with more lines after it: JSON Lines of arrays."""
    end = text.find("\n", start)
    if end < 0 or _skip(text, end) == len(text):
        return False
    try:
        json.loads(text[start:end])
    except (ValueError, RecursionError):
        return False
    return True


def _spans_lines(text: str, start: int) -> bool:
    """Whether the first value goes on beyond its line: pretty-printed objects, not JSON Lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return text[start:].split("\n", 1)[0].strip() in ("{", "[")
    return "\n" in text[start:end]


def _value(text: str, at: int, file: str) -> tuple[Any, int]:
    """One JSON value; an error here ends the file, since nothing says where the next value begins."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: column {error.colno}: {error.msg}; mend the JSON here") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{_line(text, at)}: {error}; mend the JSON here") from None
    return value, end


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _array(text: str, at: int, file: str) -> Iterator[tuple[Any, int]]:
    """The array's elements and their lines."""
    line, counted = _line(text, at), at
    at = _skip(text, at)
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = _value(text, at, file)
        yield value, line
        at = _skip(text, end)
        if at < len(text) and text[at] == ",":
            at = _skip(text, at + 1)
            if at < len(text) and text[at] == "]":
                raise DataError(f"{file}:{_line(text, at)}: a comma before the closing ]; remove it")
        elif at < len(text) and text[at] != "]":
            raise DataError(f"{file}:{_line(text, at)}: a comma is missing between two elements of the array; add it")
    if at == len(text):
        raise DataError(f"{file}:{_line(text, at)}: the array is not closed; the file may be cut short")
    if _skip(text, at + 1) != len(text):
        raise DataError(f"{file}:{_line(text, at)}: there is more after the array; keep one array in a file")


def _stream(text: str, at: int, file: str) -> Iterator[tuple[Any, int]]:
    """Values one after the other, and their lines."""
    line, counted = 1, 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        value, end = _value(text, at, file)
        yield value, line
        at = _skip(text, end)


def _collect(values: Iterator[tuple[Any, int]], file: str) -> tuple[list[Row], list[Problem]]:
    rows: list[Row] = []
    bad: list[Problem] = []
    for value, line in values:
        _add(value, line, file, rows, bad)
    return rows, bad


def _add(value: Any, line: int, file: str, rows: list[Row], bad: list[Problem]) -> None:
    if isinstance(value, dict):
        rows.append(Row(value, file, line))
    else:
        bad.append((f"{file}:{line}", f"a row must be a JSON object, not {type(value).__name__}"))


def _lines(text: str, file: str) -> tuple[list[Row], list[Problem]]:
    """JSON Lines. Lines end at a newline only: U+2028 and its like may stand inside a string."""
    rows: list[Row] = []
    bad: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip(_WHITE)
        if not line:
            continue
        try:
            _add(json.loads(line), number, file, rows, bad)
        except json.JSONDecodeError as error:
            bad.append((f"{file}:{number}", _reason(line, error)))
        except (ValueError, RecursionError) as error:
            bad.append((f"{file}:{number}", f"{error}; mend the JSON here"))
    return rows, bad


def _reason(line: str, error: json.JSONDecodeError) -> str:
    where = f"column {error.colno}: {error.msg}"
    if line.endswith(",") and error.msg == "Extra data":
        return f"{where}; remove the comma at the end of the line (JSON Lines has none)"
    if "'" in line.lstrip()[:3]:
        return f"{where}; JSON strings stand in double quotes, this looks like Python"
    return f"{where}; every line must be one whole JSON object"


def parse_table(text: str, file: str, delimiter: str) -> tuple[list[Row], list[Problem], tuple[str, ...]]:
    """CSV or TSV with a header line. Returns rows, bad rows and notes."""
    try:
        return (*_table(text, file, delimiter, csv.QUOTE_MINIMAL), ())
    except DataError:
        if delimiter != "\t":
            raise
    note = f"{file}: quotation marks do not pair as in CSV and were taken as ordinary text"
    return (*_table(text, file, delimiter, csv.QUOTE_NONE), (note,))


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
        what = f"columns {', '.join(twice)} occur twice" if twice and twice != [""] else "a column has no name"
        raise DataError(f"{file}:{line}: {what}; the first line must name every column once")
    return names
