"""Files known by their first bytes: packed ones are read, others are named with a remedy that works."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow.parquet import write_table

from finetune.data import packed_files
from finetune.data.encoding import conversion
from finetune.data.packed_files import refuse_foreign
from finetune.data.problems import BadSource
from finetune.data.read import read
from finetune.errors import DataError

ROWS = [{"text": "warm", "label": "good"}, {"text": "cold", "label": "bad"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(raw: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(raw)
    return packed.getvalue().to_pybytes()


def fields(folder: Path, name: str, raw: bytes) -> list[dict]:
    (folder / name).write_bytes(raw)
    return [dict(row.fields) for row in read(name, folder).rows]


def error(folder: Path, name: str, raw: bytes) -> str:
    with pytest.raises(DataError) as caught:
        fields(folder, name, raw)
    return str(caught.value)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_packed_files_are_read_whatever_their_name(tmp_path, pack):
    ending = ".gz" if pack is gzip.compress else ".zst"
    assert fields(tmp_path, f"rows.jsonl{ending}", pack(LINES)) == ROWS
    assert fields(tmp_path, "rows.jsonl", pack(LINES)) == ROWS
    assert fields(tmp_path, f"ROWS.CSV{ending.upper()}", pack(b"text,label\nwarm,good\ncold,bad\n")) == ROWS
    assert (
        fields(tmp_path, "two.jsonl", pack(LINES[: len(LINES) // 2 + 1]) + pack(LINES[len(LINES) // 2 + 1 :])) == ROWS
    )
    assert "packed with" in read("rows.jsonl", tmp_path).notes[0]


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_bomb_ends_at_the_bound(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(packed_files, "LEAST", 2**20)
    bomb = pack(b" " * 2**26)
    assert "becomes more than" in error(tmp_path, "bomb.jsonl", bomb)
    assert fields(tmp_path, "rows.jsonl", pack(LINES * 9_000))[-1] == ROWS[1]
    monkeypatch.setattr(packed_files, "MOST", 2**19)
    assert "unpack the file yourself" in error(tmp_path, "rows.jsonl", pack(LINES * 9_000))


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_damaged_packed_files_are_said(tmp_path, pack):
    assert "damaged or cut short" in error(tmp_path, "rows.jsonl", pack(LINES)[:-9])
    assert "packed more than once" in error(tmp_path, "rows.jsonl", pack(pack(LINES)))


def test_parquet_under_another_name_is_read(tmp_path):
    write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.csv")
    found = read("rows.csv", tmp_path)
    assert [row.fields for row in found.rows] == ROWS
    assert "a Parquet file" in found.notes[0]


def excel() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as book:
        book.writestr("[Content_Types].xml", "<Types/>" * 100)
        book.writestr("xl/workbook.xml", "<workbook/>")
    return raw.getvalue()


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return raw.getvalue()


def tar() -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return raw.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "base") as base:
        base.execute("create table rows (text, label)")
    base.close()
    return (folder / "base").read_bytes()


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("rows.xlsx", excel(), "an Excel workbook; save it as CSV UTF-8.*read_excel"),
        ("rows.csv", zipped(), "packed with zip; unpack it .unzip rows.csv"),
        ("a b.jsonl", zipped(), "unzip 'a b.jsonl'"),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file"),
        ("rows.jsonl", b"%PDF-1.7\n", "a PDF document"),
        ("rows.txt", b"%PDF-1.7\n", "a PDF document"),
        ("rows.jsonl", tar(), "packed with tar; unpack it .tar -xf rows.jsonl"),
        ("rows.tar.gz", gzip.compress(tar()), "packed with tar"),
        ("rows.csv", b"BZh91AY", "bunzip2 -k rows.csv"),
        ("rows.csv", b"<!doctype html>\n<html>", "a web page"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("rows.jsonl", b"ARROW1\0\0", "read_feather"),
        ("rows.gz", gzip.compress(LINES), "the ending must be one of .*rename"),
        ("rows.parquet", LINES, "not a Parquet file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # packed bytes hold the time at which they were packed
)
def test_a_foreign_file_is_named_for_what_it_is(tmp_path, name, raw, said):
    import re

    message = error(tmp_path, name, raw)
    assert re.search(said, message)
    assert "iconv" not in message


def test_a_database_is_named_with_the_command_that_writes_its_rows(tmp_path):
    message = error(tmp_path, "rows.db", database(tmp_path))
    assert "an SQLite database" in message
    assert "sqlite3 -header -csv rows.db" in message


def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, mark in (("posix", "'"), ("nt", '"')):
        monkeypatch.setattr("finetune.text.os", SimpleNamespace(name=system))
        assert conversion("my rows.csv", "UTF-16") == (
            f"iconv -f UTF-16 -t UTF-8 {mark}my rows.csv{mark} > {mark}my rows.utf8.csv{mark}"
        )
        with pytest.raises(BadSource, match=f"bunzip2 -k {mark}my rows.bz2{mark}"):
            refuse_foreign(b"BZh9", "my rows.bz2")
