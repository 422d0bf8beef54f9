"""A data source to rows: a local file (JSON, a table, Parquet), a package file, or a hub data set."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune.connections import to_hub
from finetune.data.encoding import decode, refuse_bad_bytes, unusual
from finetune.data.json_files import parse_json
from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row, Rows
from finetune.errors import EnvironmentProblem
from finetune.text import harmless

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BUILTIN = "builtin:"

_CELL_LIMIT = 2**31 - 1  # the largest that every platform's csv module takes


def read(source: str, base: Path) -> Rows:
    """All rows of a source, and those that cannot be read.

    source: a file (.jsonl, .json, .csv, .tsv, .parquet; relative to `base`), builtin:<package file>, or a hub
    data set as org/name, org/name:split or org/name/config:split. Raises BadSource where the source as a whole
    cannot be read, EnvironmentProblem where a library is missing for it.
    """
    ending = Path(source).suffix.lower()
    if source.startswith(_BUILTIN):
        rows = _parse(_builtin(source), source, ending)
    elif ending in ENDINGS or (base / source).exists():
        rows = _parse(_local(source, base, ending), source, ending)
    else:
        rows = _hub(source)
    if not rows.rows and not rows.bad:
        raise BadSource(f"{source}:1", "the file holds no rows; give it at least one")
    return rows


def _builtin(source: str) -> bytes:
    parts = source.removeprefix(_BUILTIN).split("/")
    resource = files("finetune").joinpath("assets", *parts)
    if ".." in parts or not resource.is_file():
        raise BadSource(source, "there is no such file in the package")
    return resource.read_bytes()


def _local(source: str, base: Path, ending: str) -> bytes:
    path = base / Path(source).expanduser()
    if path.is_dir():
        raise BadSource(source, "is a folder; name a file in it")
    if ending not in ENDINGS:
        raise BadSource(source, f"the ending must be one of {', '.join(ENDINGS)}; rename the file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = path.parent.glob("*") if path.parent.is_dir() else ()
        close = difflib.get_close_matches(path.name, [entry.name for entry in near], n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; looked in {path.parent}"
        raise BadSource(source, f"no such file{hint}") from None
    except OSError as error:
        raise BadSource(source, f"{error.strerror}; make the file readable") from None


def _parse(raw: bytes, source: str, ending: str) -> Rows:
    if ending == ".parquet":
        return _parquet(raw, source)
    encoding, text = unusual(raw), decode(raw, source)
    del raw  # a large file is not held twice
    if ending in (".csv", ".tsv"):
        rows, bad, notes = parse_table(text, source, "\t" if ending == ".tsv" else ",")
    else:
        rows, bad, notes = parse_json(text, source)
    notes = [*encoding, *notes]
    return Rows(rows, bad, (f"{source}: {'; '.join(notes)}",) if notes else ())


def _parquet(raw: bytes, source: str) -> Rows:
    from pyarrow import ArrowException, BufferReader  # type: ignore[import-untyped]
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        records = read_table(BufferReader(raw)).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise BadSource(f"{source}:1", f"not a Parquet file that can be read ({error}); write it anew") from None
    return Rows(_numbered(records, source), [])


def _numbered(records: Iterable[Mapping[str, Any]], source: str) -> list[Row]:
    return [Row(_without_padding(record), source, number) for number, record in enumerate(records, 1)]


def _without_padding(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without the nulls within its values: Arrow gives each object the keys that any other row's has."""
    return {name: _packed(value) if isinstance(value, (dict, list)) else value for name, value in record.items()}


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _packed(one) for key, one in value.items() if one is not None}
    return [_packed(one) for one in value] if isinstance(value, list) else value


def _hub(source: str) -> Rows:
    name, _, split = source.partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        reason = "neither a file nor a data set id (org/name, org/name:split, org/name/config:split)"
        raise BadSource(source, reason)
    config = parts[2] if len(parts) == 3 else None
    try:
        with to_hub():
            from datasets import load_dataset

            data = load_dataset("/".join(parts[:2]), config, split=split or "train")
    except ImportError as error:
        raise EnvironmentProblem(f"{source}: hub data sets need the package datasets ({error})") from None
    except EnvironmentProblem:
        raise
    except Exception as error:
        # The library raises some twenty unrelated types, from network failures to scripts it refuses.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadSource(
            source,
            f"no such file in the recipe's folder, and as a hub data set: {reason}; "
            "check the name and the network, or download the data and name the file",
        ) from None
    return Rows(_numbered(data, source), [])


def parse_table(text: str, file: str, delimiter: str) -> tuple[list[Row], list[Problem], list[str]]:
    """CSV or TSV with a header line. Returns rows, bad rows and notes."""
    refuse_bad_bytes(text, file)
    try:
        return (*_table(text, file, delimiter, csv.QUOTE_MINIMAL), [])
    except BadSource:
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
            reason = f"{error}; a quotation mark inside a quoted cell is written twice"
            raise BadSource(f"{file}:{line}", reason) from None
        if cells:
            yield cells, line


def _header(records: Iterator[tuple[list[str], int]], file: str) -> list[str]:
    cells, line = next(records, ([], 1))
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise BadSource(f"{file}:{line}", "the file is empty; its first line must name the columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = (
            f"columns {harmless(', '.join(twice))} occur twice" if twice and twice != [""] else "a column has no name"
        )
        raise BadSource(f"{file}:{line}", f"{what}; the first line must name every column once")
    return names
