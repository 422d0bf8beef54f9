"""JSON and JSON Lines to rows, each with its line number."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any

from finetune.data.json_shapes import key_of_rows
from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row
from finetune.text import shorten

Parsed = tuple[list[Row], list[Problem], list[str]]  # rows, bad rows, notes
_WHITE = " \t\r\n"
_LOOKED_AT = 20  # lines that tell JSON Lines from one value over many lines


class _Twice(ValueError):
    """An object holds the same key twice; a parser would keep the last in silence."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counted = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counted.items() if count > 1)
        raise _Twice(f"the key {shorten(twice, 80)} stands twice; keep one of them")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, file: str) -> Parsed:
    """JSON Lines, one array, or objects one after the other, told apart by their content and not by the ending."""
    start = _skip(text, 0)
    if start == len(text):
        return [], [], []
    rows, bad, notes = _parse(text, start, file)
    if len(rows) == 1 and not bad and (key := key_of_rows(rows[0].fields, rows[0].location)) is not None:
        rows, bad = _collect(_under(text, start, key, file), file)
        notes = [f"rows under the key {shorten(key, 40)}"]
    return rows, bad, notes


def _parse(text: str, start: int, file: str) -> Parsed:
    named_json = ".json" in PurePath(file.lower()).suffixes
    if not _is_lines(text):
        if text[start] == "[" and not _is_line_of_values(text, start):
            notes = [] if named_json else ["one JSON array, not JSON Lines"]
            return (*_collect(_array(text, start + 1, file), file), notes)
        if _spans_lines(text, start):
            return (*_collect(_stream(text, start, file), file), ["JSON objects that span lines, not JSON Lines"])
    return _lines(text, file, ["JSON Lines, not one JSON value"] if named_json and "\n" in text.strip() else [])


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _WHITE:
        at += 1
    return at


def _is_lines(text: str) -> bool:
    """Whether at least half of the first lines are whole objects: a broken first line does not change the kind."""
    lines = list(islice(filter(None, _split_lines(text)), _LOOKED_AT))
    return 2 * sum(_is_object(line) for line in lines) >= len(lines)


def _split_lines(text: str) -> Iterator[str]:
    """One at a time, so that the file is not held twice; without white space at its end."""
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        yield text[at:end].rstrip(_WHITE)
        at = end + 1


def _is_object(line: str) -> bool:
    if not (line.lstrip(_WHITE).startswith("{") and line.endswith("}")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        reason = f"column {error.colno}: {error.msg}; fix the JSON here"
        raise BadSource(f"{file}:{error.lineno}", reason) from None
    except (ValueError, RecursionError) as error:
        reason = "the values are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadSource(f"{file}:{_line(text, at)}", f"{reason}; fix the JSON here") from None
    return value, end


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _under(text: str, start: int, key: str, file: str) -> Iterator[tuple[Any, int]]:
    """The elements of the list under one key of the object that begins at `start`, which is whole, and their lines."""
    at = _skip(text, start + 1)
    name = ""
    while name != key:
        name, at = _value(text, at, file)
        at = _skip(text, _skip(text, at) + 1)  # behind the colon
        if name != key:
            _, at = _value(text, at, file)
            at = _skip(text, _skip(text, at) + 1)  # behind the comma
    yield from _array(text, at + 1, file, alone=False)


def _array(text: str, at: int, file: str, alone: bool = True) -> Iterator[tuple[Any, int]]:
    """The array's elements and their lines. alone: nothing may come after it."""
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
                raise BadSource(f"{file}:{_line(text, at)}", "a comma before the closing ]; remove it")
        elif at < len(text) and text[at] != "]":
            reason = "a comma is missing between two elements of the array; add it"
            raise BadSource(f"{file}:{_line(text, at)}", reason)
    if at == len(text):
        raise BadSource(f"{file}:{_line(text, at)}", "the array is not closed; the file may be cut short")
    if alone and _skip(text, at + 1) != len(text):
        raise BadSource(f"{file}:{_line(text, at)}", "there is more after the array; keep one array in a file")


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
        reason = f"a row must be a JSON object, not {type(value).__name__}; give its fields names"
        bad.append((f"{file}:{line}", reason))


def _lines(text: str, file: str, notes: list[str]) -> Parsed:
    """JSON Lines. Lines end at a newline only: U+2028 and its like may stand inside a string."""
    rows: list[Row] = []
    bad: list[Problem] = []
    blank = 0
    for number, line in enumerate(_split_lines(text), 1):
        if not line:
            blank += 1
        else:
            _read_line(line, number, file, rows, bad)
    return rows, bad, [*notes, f"{blank} blank lines left out"] if blank else notes


def _read_line(line: str, number: int, file: str, rows: list[Row], bad: list[Problem]) -> None:
    try:
        _add(_DECODER.decode(line), number, file, rows, bad)
    except json.JSONDecodeError as error:
        bad.append((f"{file}:{number}", _reason(line, error)))
    except RecursionError:
        bad.append((f"{file}:{number}", "the values are nested too deeply; fix the JSON here"))
    except ValueError as error:
        bad.append((f"{file}:{number}", str(error) if isinstance(error, _Twice) else f"{error}; fix the JSON here"))


def _reason(line: str, error: json.JSONDecodeError) -> str:
    where = f"column {error.colno}: {error.msg}"
    if line[error.pos : error.pos + 1] == "\ufeff":
        return (
            f"{where}: an invisible byte order mark (U+FEFF), where two files were put together; break the line there"
        )
    if line.endswith(",") and error.msg == "Extra data":
        return f"{where}; remove the comma at the end of the line (JSON Lines has none)"
    if "\r" in line:
        return f"{where}; the lines seem to end in CR alone, end them in LF (tr '\\r' '\\n')"
    if "'" in line.lstrip()[:3]:
        return f"{where}; JSON strings stand in double quotes, this looks like Python"
    if error.msg.startswith("Invalid control character"):
        return f"{where} (U+{ord(line[error.pos]):04X}); write it as an escape, such as \\t, or remove it"
    return f"{where}; every line must be one whole JSON object"
