"""CSV as programs write it: other delimiters, columns without a name, and files put together."""

from __future__ import annotations

import re

import pytest

from finetune.data.read import read
from finetune.data.tables import parse_table
from finetune.errors import DataError

GOOD = [{"text": "warm, and long", "label": "good"}, {"text": "cold", "label": "bad"}]


def parsed(text: str, delimiter: str = ",") -> tuple[list[dict], list[str]]:
    rows, bad, notes = parse_table(text, "f.csv", delimiter)
    assert not bad
    return [dict(row.fields) for row in rows], notes


@pytest.mark.parametrize(
    ("text", "delimiter", "said"),
    [
        ("text;label\nwarm, and long;good\ncold;bad\n", ",", "semicolons"),
        ('text;label\n"warm, and long";good\n"cold";bad\n', ",", "semicolons"),
        ("text\tlabel\nwarm, and long\tgood\ncold\tbad\n", ",", "tabs"),
        ("text|label\nwarm, and long|good\ncold|bad\n", ",", "bars"),
        ("text;label\nwarm, and long;good\ncold;bad\n", "\t", "semicolons"),
        ('text,label\n"warm, and long",good\ncold,bad\n', "\t", "commas"),
        ('sep=;\ntext;label\n"warm, and long";good\ncold;bad\n', ",", "first line"),
        ("sep=|\r\ntext|label\r\nwarm, and long|good\r\ncold|bad\r\n", ",", "first line"),
        ('"sep=^"\ntext^label\nwarm, and long^good\ncold^bad\n', ",", "first line"),
    ],
)
def test_the_delimiter_is_the_one_that_fits(text: str, delimiter: str, said: str) -> None:
    rows, notes = parsed(text, delimiter)
    assert rows == GOOD
    assert said in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        'text,label\n"warm, and long",good\ncold,bad\n',
        'text,"label"\r\n"warm, and long","good"\r\n"cold","bad"\r\n',
    ],
)
def test_the_promised_delimiter_is_taken_without_a_word(text: str) -> None:
    assert parsed(text) == (GOOD, [])


@pytest.mark.parametrize("text", ["a;b", "a|b", "a; b\tc"])
def test_other_delimiters_in_the_cells_change_nothing(text: str) -> None:
    assert parsed(f"text,label\n{text},good\n{text},bad\n")[0][0] == {"text": text, "label": "good"}
    assert parsed(f"text\n{text}\nno more\n")[0][0] == {"text": text}


def test_one_bad_row_does_not_change_the_delimiter() -> None:
    rows, bad, notes = parse_table("text;label\na;b\nc;d;e\nf;g\n", "f.csv", ",")
    assert len(rows) == 2
    assert bad == [("f.csv:3", "3 cells, and the header has 2; put text with the delimiter in double quotes")]
    assert "semicolons" in notes[0]


def test_lines_are_counted_from_the_first_of_the_file() -> None:
    rows, bad, _ = parse_table("sep=;\ntext;label\na;b\n\nc\n", "f.csv", ",")
    assert [row.line for row in rows] == [3]
    assert bad[0][0] == "f.csv:5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",text,label\n0,cold,bad\n1,warm,good\n", "numbers the rows"),  # pandas
        (",text,label\n7,cold,bad\n2,warm,good\n31,soft,good\n", "numbers the rows"),  # a part of a frame
        (",text,label\n" + 2 * "".join(f"{n},cold,bad\n" for n in range(12)), "numbers the rows"),  # two frames in one
        ("text,label,\ncold,bad,1\nwarm,good,2\nsoft,good,3\n", "numbers the rows"),
        ('"text"\t"label"\n"1"\t"cold"\t"bad"\n"2"\t"warm"\t"good"\n', "numbers the rows"),  # R's write.table
        ("label,text,,,\nbad,cold,,,\ngood,warm,,,\n", "3 empty columns"),
        ("label,text,,\nbad,cold\ngood,warm,\n", "2 empty columns"),  # Excel leaves empty cells out after a while
        ("label,text\nbad,cold,,\ngood,warm,\n", "2 rows: empty cells"),
        ("label,text\nbad,cold\n,\ngood,warm\n,,\n", "2 lines of empty cells"),
        ("label,text\nbad,cold\nlabel,text\ngood,warm\n", "stands 1 more times"),
    ],
)
def test_what_says_nothing_is_left_out_and_noted(text: str, said: str) -> None:
    rows, notes = parsed(text)
    assert rows[0] == {"text": "cold", "label": "bad"}
    assert all(row.keys() == {"text", "label"} for row in rows)
    assert said in "; ".join(notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,\ncold,bad\nwarm,good\n", "column 2 has no name, and holds 'bad'"),
        ("text,\ncold,0\nwarm,1\nwarm,1\nsoft,0\nold,1\n", "column 2 has no name, and holds '0'"),
        (",text\n1,cold\n0,warm\n1,soft\n1,old\n", "column 1 has no name"),
        ("a,,b\n1,x,2\n", "column 2 has no name, and holds 'x'"),
    ],
)
def test_a_nameless_column_that_says_something_is_an_error_with_its_remedy(text: str, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        parse_table(text, "f.csv", ",")
    assert "f.csv:1" in str(caught.value)
    assert "to_csv(index=False)" in str(caught.value)


def test_byte_order_marks_in_the_middle_are_taken_off(tmp_path) -> None:
    (tmp_path / "glued.csv").write_text("\ufefftext,label\na,b\n\ufefftext,label\n\ufeffc,d\n", encoding="utf-8")
    (tmp_path / "glued.jsonl").write_text('\ufeff{"text": "a\ufeffb"}\n\ufeff\ufeff{"text": "c"}\n', encoding="utf-8")
    table, lines = read("glued.csv", tmp_path), read("glued.jsonl", tmp_path)
    assert [row.fields["text"] for row in table.rows] == ["a", "c"]
    assert "2 byte order marks" in table.notes[0]
    assert "stands 1 more times" in table.notes[0]
    assert [row.fields["text"] for row in lines.rows] == ["a\ufeffb", "c"]
    assert "1 byte order marks" in lines.notes[0]
    (tmp_path / "glued.jsonl").write_text('{"text": "a"}\ufeff{"text": "c"}\n', encoding="utf-8")
    assert "byte order mark" in read("glued.jsonl", tmp_path).bad[0][1]
