"""Unpacks compressed files by their first bytes; names other file types with a remedy."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from finetune.data.problems import BadSource
from finetune.errors import EnvironmentProblem
from finetune.text import amount, command_line

HEAD = 512  # bytes that are looked at
MOST = 4 * 2**30  # bytes that a packed file may become
LEAST = 256 * 2**20  # bytes that it always may
FACTOR = 100  # and times its own size: rows of text are packed to a tenth, a bomb to a thousandth
PARQUET = b"PAR1"
_PIECE = 2**20

_SHEET = "save it as CSV UTF-8 in the program that made it, or use pandas (with openpyxl): {pandas:read_excel}"
_IMAGE = "rows are text; name a file of rows"
# (where in the file, bytes, what it is, remedy); {file} is the file as the shell takes it.
_FOREIGN = (
    (0, b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV UTF-8 in the program that made it"),
    (
        0,
        b"SQLite format 3\0",
        "an SQLite database",
        "write a table of it: sqlite3 -header -csv {file} 'select * from TABLE' > rows.csv",
    ),
    (0, b"%PDF", "a PDF document", "take its text out (pdftotext {file}), and write it as rows"),
    (0, b"ARROW1", "an Arrow (Feather) file", "write it as JSON Lines: {pandas:read_feather}"),
    (0, b"\xff\xff\xff\xff", "an Arrow file of datasets", "write its rows with Dataset.from_file(...).to_json(...)"),
    (0, b"ORC", "an ORC file", "write it as JSON Lines: {pandas:read_orc}"),
    (0, b"\x89HDF", "an HDF5 file", "write it as JSON Lines: {pandas:read_hdf}"),
    (0, b"Obj\x01", "an Avro file", "write its rows as JSON Lines"),
    (0, b"\x80\x04\x95", "a Python pickle, which may run code when it is read", "write its rows as JSON Lines"),
    (0, b"BZh", "packed with bzip2", "unpack it: bunzip2 -k {file}"),
    (0, b"\xfd7zXZ\0", "packed with xz", "unpack it: unxz -k {file}"),
    (0, b"7z\xbc\xaf", "packed with 7-Zip", "unpack it (7z x {file}), and name a file of it"),
    (0, b"Rar!", "packed with RAR", "unpack it (unrar x {file}), and name a file of it"),
    (257, b"ustar", "packed with tar", "unpack it (tar -xf {file}), and name a file of it"),
    (0, b"\x89PNG", "an image", _IMAGE),
    (0, b"\xff\xd8\xff", "an image", _IMAGE),
    (0, b"version https://git-lfs", "a pointer of Git LFS and not the file", "fetch the file: git lfs pull"),
    (0, b"<!DOCTYPE html", "a web page", "where a file was downloaded, take the address of the raw file"),
    (0, b"<html", "a web page", "where a file was downloaded, take the address of the raw file"),
)


def refuse_foreign(head: bytes, source: str) -> None:
    """Raises BadSource for a file that is no rows, whatever its name says. head: its first `HEAD` bytes."""
    for at, begins, what, remedy in (*_zipped(head, source), *_FOREIGN):
        if head[at : at + len(begins)].lower() == begins.lower():
            raise BadSource(source, f"is {what}; {_remedy(remedy, source)}")


def _zipped(head: bytes, source: str) -> tuple[tuple[int, bytes, str, str], ...]:
    """Tables of Excel and LibreOffice are zip files too, told apart by what is in them, or by their names."""
    begins, ending = b"PK\x03\x04", PurePath(source).suffix.lower()
    if b"xl/" in head or ending in (".xlsx", ".xlsm"):
        return ((0, begins, "an Excel workbook", _SHEET),)
    if b"opendocument.spreadsheet" in head:
        return ((0, begins, "an OpenDocument table", _SHEET),)
    return ((0, begins, "packed with zip", "unpack it (unzip {file}), and name a file of it"),)


def _remedy(remedy: str, source: str) -> str:
    before, _, read = remedy.partition("{pandas:")
    if read:
        to = str(PurePath(source).with_suffix(".jsonl"))
        code = f"import pandas; pandas.{read.rstrip('}')}({source!r}).to_json({to!r}, orient='records', lines=True)"
        return before + command_line("python", "-c", code)
    return remedy.replace("{file}", command_line(source))


def unpack(raw: bytes, source: str) -> tuple[bytes, list[str]]:
    """The bytes that were packed with gzip or Zstandard, by what they begin with, and a note; others as they are.

    Raises BadSource for what is damaged, or becomes more than anybody's rows would.
    """
    packings: tuple[tuple[bytes, str, Callable[[bytes], Any]], ...] = (
        (b"\x1f\x8b", "gzip", lambda raw: gzip.GzipFile(fileobj=io.BytesIO(raw))),
        (b"\x28\xb5\x2f\xfd", "Zstandard", _zstandard),
    )
    notes: list[str] = []
    for begins, name, opened in packings:
        if raw.startswith(begins):
            raw = _whole(opened(raw), source, name, min(MOST, max(LEAST, FACTOR * len(raw))))
            notes.append(f"packed with {name}")
    if notes:
        if any(raw.startswith(begins) for begins, *_ in packings):
            raise BadSource(source, "packed more than once; unpack it yourself, and name what comes of it")
        refuse_foreign(raw[:HEAD], source)
    return raw, notes


def _zstandard(raw: bytes) -> Any:
    try:
        from pyarrow import BufferReader, input_stream  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentProblem(f"files packed with Zstandard need the package pyarrow ({error})") from None
    return input_stream(BufferReader(raw), compression="zstd")


def _whole(stream: Any, source: str, name: str, most: int) -> bytes:
    """All of the stream, a piece at a time so that a bomb ends at the bound and not with the memory."""
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := stream.read(_PIECE):
            size += len(piece)
            if size > most:
                reason = f"packed with {name}, it becomes more than {amount(most)}, as no rows do; if these are rows"
                raise BadSource(source, f"{reason}, unpack the file yourself, and name what comes of it")
            pieces.append(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise BadSource(source, f"packed with {name}, and damaged or cut short ({error}); fetch it again") from None
    return b"".join(pieces)
