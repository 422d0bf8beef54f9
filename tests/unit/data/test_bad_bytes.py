"""Bytes that are not UTF-8: which rows have them, and a remedy that does no harm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.data.problems import BadSource
from finetune.data.read import read
from finetune.recipe.load import check_recipe

SAID = [f"row {i}: naïve café, “señor”" for i in range(12)]
ALPHABETS = {
    "cp1252": "Die Äpfel sind süß, und das “Café” ist schön \u2013 für Élodie.",
    "latin-1": "El niño comió en el café y habló en español",
    "cp1251": "Привет, как дела? Всё «хорошо»",
    "shift_jis": "これはテストです。映画はとても良かった",
    "euc_kr": "이 영화는 정말 재미있었다",
    "gb2312": "这部电影很好看\uff0c我很喜欢",
}


def written(folder: Path, ending: str, lines: list[bytes]) -> Path:
    """The texts as rows of a file of that form. The first row stands in its second line."""
    file = folder / f"rows{ending}"
    if ending == ".csv":
        parts = [b"text,label", *(b'"%s",a' % line.replace(b'"', b'""') for line in lines)]
    else:
        rows = [b'{"text": "%s", "label": "a"}' % line for line in lines]
        parts = [b"", *rows] if ending == ".jsonl" else [b"[", *(row + b"," for row in rows[:-1]), rows[-1], b"]"]
    file.write_bytes(b"\n".join(parts))
    return file


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
def test_utf8_with_some_bad_bytes_is_never_converted(tmp_path: Path, ending: str) -> None:
    lines = [text.encode() for text in SAID]
    lines[3], lines[7] = b"it\x92s a caf\xe9 \x80", lines[7] + b"\xff"
    found = read(str(written(tmp_path, ending, lines)), None)
    assert [row.fields["text"] for row in found.rows] == [text for i, text in enumerate(SAID) if i not in (3, 7)]
    (first, reason), (second, other) = found.bad
    assert (first[-2:], second[-2:]) == (":5", ":9") and "byte 0x92" in reason and "byte 0xff" in other
    assert "iconv" not in reason and "data.encoding" not in reason
    assert "the 4 bytes of 2 rows that are not, or leave such rows out" in reason and "data.on_error: skip" in reason


@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_an_encoding_is_named_that_gives_the_text_back(tmp_path: Path, ending: str, name: str) -> None:
    file = written(tmp_path, ending, [f"{ALPHABETS[name]} {i}".encode(name) for i in range(5)])
    found = read(str(file), None)
    assert len(found.bad) == 5
    named = re.search(r"set data\.encoding: (\S+),", found.bad[0][1])
    assert named is not None and named[1] == ("cp1252" if name == "latin-1" else name)
    assert f"iconv -f {named[1].upper()} -t UTF-8" in found.bad[0][1] and "iconv" not in found.bad[1][1]
    again = read(str(file), None, encoding=named[1])
    assert not again.bad and [row.fields["text"] for row in again.rows] == [f"{ALPHABETS[name]} {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "text"),
    [("cp1250", "Zażółć gęślą jaźń, świętość"), ("cp1253", "\u039a\u03b1λημέ\u03c1\u03b1"), ("cp1255", "שלום עולם")],
)
def test_no_encoding_is_named_that_would_be_a_guess(tmp_path: Path, name: str, text: str) -> None:
    file = written(tmp_path, ".jsonl", [text.encode(name)] * 3)
    reason = read(str(file), None).bad[0][1]
    assert "iconv" not in reason and "name its encoding with data.encoding" in reason
    assert read(str(file), None, encoding=name).rows[0].fields["text"] == text


def test_what_the_named_encoding_lacks_is_a_bad_row(tmp_path: Path) -> None:
    file = written(tmp_path, ".jsonl", ["café".encode("cp1252"), b"a \x81 b"])
    found = read(str(file), None, encoding="cp1252")
    assert len(found.rows) == 1 and "byte 0x81 is not cp1252; correct it" in found.bad[0][1]


def test_utf16_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes((json.dumps({"text": "x"}) + "\n").encode("utf-16-le"))
    with pytest.raises(BadSource, match=r"iconv -f UTF-16LE .*, or set data\.encoding: utf-16le"):
        read(str(file), None)
    assert read(str(file), None, encoding="utf-16le").rows[0].fields == {"text": "x"}
    with pytest.raises(BadSource, match="is not utf-32"):
        read(str(written(tmp_path, ".csv", [b"odd"])), None, encoding="utf-32")


@pytest.mark.parametrize("name", ["cp9999", "rot13", "", "hex"])
def test_an_encoding_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=r"data\.encoding: .* is no encoding of text"):
        check_recipe({"model": {"path": "m"}, "data": {"train": "x", "encoding": name}})
