"""Reads a data source into rows: local files (JSON, tables, Parquet), package data, or a hub data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from finetune.connections import to_hub
from finetune.data.bad_bytes import without_bad_bytes
from finetune.data.class_names import class_notes, named, names_in_schema, names_of
from finetune.data.encoding import decode, unusual, without_marks
from finetune.data.json_files import parse_json
from finetune.data.packed_files import HEAD, PARQUET, refuse_foreign, unpack
from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row, Rows
from finetune.data.sources import ENDINGS, PACKINGS, TABLES, SplitName, ending_of, files_of, shown
from finetune.data.tables import parse_table
from finetune.errors import EnvironmentProblem
from finetune.recipe.names import BUILTIN, hub_id_in, is_address
from finetune.text import shorten

MOST_ROW = 16 * 10**6  # characters; a tokenizer takes some 30 bytes of memory for each


def read(source: str, base: Path | None, split: SplitName = "train", encoding: str | None = None) -> Rows:
    """All rows of a source, and those that cannot be read.

    source: a file, a pattern of files (data/*.jsonl) or a folder with files of each split, relative to `base`
    (None: absolute); builtin:<package file>; or a hub data set as org/name, org/name:split or org/name/config:split.
    split: which of a folder's is read. encoding: of text files; UTF-8 without one.
    Raises BadSource where the source as a whole cannot be read, EnvironmentProblem where a library is missing for it.
    """
    if source.startswith(BUILTIN):
        rows = _parse(_builtin(source), source)
    elif is_address(source):
        name = hub_id_in(source)
        raise BadSource(source, f"is an address; {f'write {name}' if name else 'download the file, and name it'}")
    elif (files := files_of(source, base, split)) is not None:
        rows = _together([_file(path, shown(path, source, base), encoding) for path in files.paths], files.notes)
    else:
        rows = _hub(source)
    if not rows.rows and not rows.bad:
        raise BadSource(f"{source}:1", "the file holds no rows; give it at least one")
    return rows


def _together(parts: list[Rows], notes: tuple[str, ...]) -> Rows:
    if len(parts) == 1:
        rows, bad = parts[0].rows, parts[0].bad
    else:
        rows = [row for part in parts for row in part.rows]
        bad = [problem for part in parts for problem in part.bad]
    return Rows(rows, bad, (*notes, *(note for part in parts for note in part.notes)))


def _builtin(source: str) -> bytes:
    parts = source.removeprefix(BUILTIN).split("/")
    resource = resources.files("finetune").joinpath("assets", *parts)
    if ".." in parts or not resource.is_file():
        raise BadSource(source, "there is no such file in the package")
    return resource.read_bytes()


def _file(path: Path, source: str, encoding: str | None) -> Rows:
    """source: how messages name the file."""
    if not path.is_file():
        raise BadSource(source, "is not an ordinary file; write its rows into one")
    try:
        with path.open("rb") as file:
            refuse_foreign(file.read(HEAD), source)  # before a film or a data base is read whole
            file.seek(0)
            raw = file.read()
    except OSError as error:
        raise BadSource(source, f"{error.strerror}; make the file readable") from None
    return _parse(raw, source, encoding)


def _parse(raw: bytes, source: str, encoding: str | None = None) -> Rows:
    """Rows by what the name says is in the file; what its first bytes say goes before."""
    ending = ending_of(source)
    raw, notes = unpack(raw, source)
    if raw.startswith(PARQUET):
        return _parquet(raw, source, [*notes, *([] if ending == ".parquet" else ["a Parquet file"])])
    if ending == ".parquet":
        raise BadSource(f"{source}:1", "not a Parquet file, nor another that is known; give it its own ending")
    if ending not in ENDINGS:
        raise BadSource(source, f"the ending must be one of {_endings()}; rename the file")
    notes += unusual(raw)
    text, marks = without_marks(decode(raw, source, encoding))
    del raw  # a large file is not held twice
    if ending in TABLES:
        rows, bad, more_notes = parse_table(text, source, "," if ending == ".csv" else "\t")
    else:
        rows, bad, more_notes = parse_json(text, source)
    rows, spoilt = without_bad_bytes(rows, text, source, encoding)
    notes += [*marks, *more_notes]
    return _bounded(Rows(rows, [*spoilt, *bad], _noted(source, notes)), len(text))


def _bounded(everything: Rows, size: int) -> Rows:
    """Without rows of more than `MOST_ROW` characters, which are bad ones. size: characters of them all, at least."""
    if size <= MOST_ROW:
        return everything
    sizes = [_size(row.fields) for row in everything.rows]
    reason = f"characters in one row, and {MOST_ROW:,} are the most; write it as several rows"
    long = [
        (row.location, f"{count:,} {reason}")
        for row, count in zip(everything.rows, sizes, strict=True)
        if count > MOST_ROW
    ]
    rows = [row for row, count in zip(everything.rows, sizes, strict=True) if count <= MOST_ROW]
    return Rows(rows, [*everything.bad, *long], everything.notes)


def _size(value: Any) -> int:
    """Characters of all texts in it, and one for every other value."""
    count, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += (*value, *value.values())
        elif isinstance(value, list):
            left += value
        count += len(value) if isinstance(value, str) else 1
    return count


def _endings() -> str:
    return f"{', '.join(ENDINGS)} (packed: with {' or '.join(PACKINGS)} after it)"


def _noted(source: str, notes: list[str]) -> tuple[str, ...]:
    return (f"{source}: {'; '.join(notes)}",) if notes else ()


def _parquet(raw: bytes, source: str, notes: list[str]) -> Rows:
    from pyarrow import ArrowException, BufferReader  # type: ignore[import-untyped]
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        table = read_table(BufferReader(raw))
        records, bad = _records(table, source)
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadSource(f"{source}:1", f"not a Parquet file that can be read ({error}); write it anew") from None
    names = names_in_schema(table.schema.metadata)
    rows = _numbered(named(list(records.values()), names), source, records)
    return _bounded(Rows(rows, bad, _noted(source, [*notes, *class_notes(names)])), table.nbytes)


def _records(table: Any, source: str) -> tuple[dict[int, dict[str, Any]], list[Problem]]:
    """An Arrow table's rows by number, and those that hold a date, time or duration which Python does not have."""
    try:
        return dict(enumerate(table.to_pylist(), 1)), []
    except (ValueError, OverflowError):
        records: dict[int, dict[str, Any]] = {}
        bad: list[Problem] = []
    for number in range(1, table.num_rows + 1):
        try:
            records[number] = table.slice(number - 1, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            reason = f"a date, time or duration out of range ({shorten(str(error), 80)}); correct it, or write text"
            bad.append((f"{source}:{number}", reason))
    return records, bad


def _numbered(records: Iterable[Mapping[str, Any]], source: str, numbers: Iterable[int] | None = None) -> list[Row]:
    """numbers: of the rows, where some are left out."""
    counted = enumerate(records, 1) if numbers is None else zip(numbers, records, strict=True)
    return [Row(_without_padding(record), source, number) for number, record in counted]


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
    names = names_of(getattr(data, "features", None))
    return Rows(_numbered(named(data, names), source), [], _noted(source, class_notes(names)))
