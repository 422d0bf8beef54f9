"""Files of every kind to rows, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.json_files import parse_json
from finetune.data.problems import refuse_rows
from finetune.data.read import read
from finetune.data.rows import Row
from finetune.errors import DataError

ROWS = [{"text": "good\u2028film", "label": "pos"}, {"text": 'bad, "very" bad\n', "label": "neg"}]


def read_rows(source: str, base: Path) -> list[Row]:
    """None of them may be bad."""
    found = read(source, base)
    refuse_rows(found.bad)
    return found.rows


def rows_of(tmp_path: Path, name: str, content: str | bytes) -> list[tuple[dict, int]]:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(dict(row.fields), row.line) for row in read_rows(name, base=tmp_path)]


def error_of(tmp_path: Path, name: str, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, name, content)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), [1, 2]),
        ("\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n", [1, 3]),
        ("\ufeff" + "\n".join(json.dumps(row) for row in ROWS), [1, 2]),
        (json.dumps(ROWS), [1, 1]),
        (json.dumps(ROWS, indent=2), [2, 6]),
        ("\n" + json.dumps(ROWS[0], indent=1) + "\n\n" + json.dumps(ROWS[1], indent=1), [2, 7]),
    ],
    ids=["lines", "crlf and blank lines", "byte order mark", "array", "indented array", "indented objects"],
)
def test_json_is_told_apart_by_its_content(tmp_path, ending, written, lines):
    assert rows_of(tmp_path, f"data{ending}", written) == list(zip(ROWS, lines, strict=True))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1), st.booleans())
def test_every_json_round_trips(rows, array):
    written = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    found, bad, _ = parse_json(written, "f")
    assert [row.fields for row in found] == rows and not bad


def test_csv_keeps_quotes_commas_and_newlines_in_cells(tmp_path):
    written = '\ufefftext,label\r\n"a, ""b""\r\nc",pos\r\n\r\nd,neg\r\n'
    assert rows_of(tmp_path, "d.csv", written) == [
        ({"text": 'a, "b"\r\nc', "label": "pos"}, 2),
        ({"text": "d", "label": "neg"}, 5),
    ]
    assert rows_of(tmp_path, "d.tsv", "text\tlabel\nx, y\tpos\n") == [({"text": "x, y", "label": "pos"}, 2)]


def test_csv_cells_may_be_long(tmp_path):
    assert len(rows_of(tmp_path, "d.csv", f"text\n{'x' * 200_000}\n")[0][0]["text"]) == 200_000


def test_tsv_with_stray_quotes_is_taken_literally(tmp_path):
    (tmp_path / "d.tsv").write_text('a\tb\n1\t" open\n2\tx "y" z\n')
    found = read("d.tsv", tmp_path)
    assert [row.fields["b"] for row in found.rows] == ['" open', 'x "y" z']
    assert "ordinary text" in found.notes[0]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    assert [(row.fields, row.line) for row in read_rows("d.parquet", base=tmp_path)] == [(ROWS[0], 1), (ROWS[1], 2)]
    assert "d.parquet:1: not a Parquet file" in error_of(tmp_path, "d.parquet", b"nonsense")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n{"a": 2}', "d.jsonl:2: column 6: Expecting value"),
        ("d.jsonl", '{"a": 1}\n{"a": 1},\n', "d.jsonl:2: column 9: Extra data; remove the comma"),
        ("d.jsonl", "{'a': 1}\n", "d.jsonl:1: column 2: .*Python"),
        ("d.jsonl", '{"a": 1}\n[1]\n', "d.jsonl:2: a row must be a JSON object, not list"),
        ("d.jsonl", "[1]\n[2]\n", "d.jsonl:2: a row must be a JSON object"),
        ("d.jsonl", '{"a": ' + "[" * 100_000, "d.jsonl:1: "),
        ("d.json", '[{"a": 1},\n {"a": }]', "d.json:2: column 8: Expecting value"),
        ("d.json", '[{"a": 1}\n {"a": 2}]', "d.json:2: a comma is missing"),
        ("d.json", '[{"a": 1},\n]', "d.json:2: a comma before the closing"),
        ("d.json", '[{"a": 1}', "d.json:1: the array is not closed"),
        ("d.json", '[{"a": 1}] more', "d.json:1: there is more after the array"),
        ("d.json", "[1]", "d.json:1: a row must be a JSON object, not int"),
        ("d.jsonl", "", "d.jsonl:1: the file holds no rows"),
        ("d.jsonl", '{\n"a": 1\n}\n{\n"a": x}', "d.jsonl:5: column 6"),
        ("d.csv", "", "d.csv:1: the file is empty"),
        ("d.csv", "a,b\n1,2,3\n1\n", "d.csv:2: 3 cells, and the header has 2.*\n.*d.csv:3: 1 cells"),
        ("d.csv", "a,a\n1,2\n", "d.csv:1: columns a occur twice"),
        ("d.csv", "a,\n1,2\n", "d.csv:1: column 2 has no name, and holds '2'.*index=False"),
        ("d.csv", 'a\nx\n"open\ny\n', "d.csv:3: unexpected end of data"),
        ("d.jsonl", '{"a": "é"}'.encode("utf-16"), "save it as UTF-8: iconv -f UTF-16 -t UTF-8 d.jsonl > d.utf8.jsonl"),
        ("d.jsonl", '{"a": "é"}'.encode("utf-16-le"), "UTF-16; save it as UTF-8: iconv -f UTF-16LE -t UTF-8"),
        ("d.jsonl", '{"a": 1}\n{"a": "é"}'.encode("latin-1"), "d.jsonl:2: byte 0xe9 is not UTF-8"),
        ("d.txt", "hello", "d.txt: the ending must be one of"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, said):
    assert re.search(said, error_of(tmp_path, name, content), re.DOTALL)


def test_bad_rows_are_gathered_or_skipped(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(['{"a": 1}', *["x"] * 25]))
    with pytest.raises(DataError) as caught:
        read_rows("d.jsonl", base=tmp_path)
    text = str(caught.value)
    assert text.count("column 1") == 20 and "and 5 more" in text and "25 bad rows" in text
    found = read("d.jsonl", tmp_path)
    assert len(found.rows) == 1 and len(found.bad) == 25 and found.bad[0][0] == "d.jsonl:2"


def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl"):
        read_rows("trian.jsonl", base=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder without files of rows"):
        read_rows("empty", base=tmp_path)


def test_hub_ids(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "org/absent":
            raise RuntimeError("could not reach the hub\nat all")
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source in ("imdb", "org/name:test", "org/name/config:train[:10]"):
        assert [row.line for row in read_rows(source, base=tmp_path)] == [1, 2]
    assert asked == [("imdb", None, "train"), ("org/name", None, "test"), ("org/name", "config", "train[:10]")]
    with pytest.raises(DataError, match=r"org/absent: no such file.*could not reach the hub; check"):
        read_rows("org/absent", base=tmp_path)
    with pytest.raises(DataError, match="neither a file nor"):
        read_rows("a/b/c/d", base=tmp_path)


def test_absent_builtin_is_named(tmp_path):
    with pytest.raises(DataError, match=r"builtin:none/x.jsonl"):
        read_rows("builtin:none/x.jsonl", base=tmp_path)


@pytest.mark.skipif(not shutil.which("iconv"), reason="no iconv here")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["my rows.jsonl", "rows.csv"])
def test_the_command_for_another_encoding_mends_the_file(tmp_path, encoding, name):
    said = '{"a": "Ärger, “naïf”"}\n' if encoding != "latin-1" else '{"a": "Ärger, naïf"}\n'
    text = said if name.endswith("jsonl") else f"a,b\n{said[7:-3]},1\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError) as caught:
        read_rows(name, base=tmp_path)
    command = re.search(r"iconv .*utf8\.\w+'?", str(caught.value))
    assert command is not None
    subprocess.run(command[0], shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / name.replace(".", ".utf8.")).read_text("utf-8") == text
