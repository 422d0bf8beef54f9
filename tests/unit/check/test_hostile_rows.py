"""Whatever bytes a file holds, reading it ends with rows or with an error that names the file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.formats import recognise
from finetune.data.problems import refuse_rows
from finetune.data.read import ENDINGS, read
from finetune.data.records import read_records
from finetune.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=6,
)
columns = st.sampled_from(["messages", "conversations", "text", "label", "prompt", "completion", "tools", "input"])


def read_all(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            found = read(name, Path(folder))
            if found.rows:
                records, bad = read_records(found.rows, recognise(found.rows))
                assert len(records) + len(bad) == len(found.rows)
            assert all(place.startswith(f"{name}:") for place, _ in found.bad)
        except DataError as error:
            assert name in str(error)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(ENDINGS))
def test_any_bytes(content, ending):
    read_all(f"a{ending}", content)


@settings(deadline=None)
@given(st.text(st.sampled_from('{}[]",:\n\r\t\\a1 .\ufeff\u2028\x00'), max_size=60), st.sampled_from(ENDINGS))
def test_any_punctuation(content, ending):
    read_all(f"a{ending}", content.encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(columns, values, min_size=1, max_size=3), min_size=1, max_size=6))
def test_any_values_in_known_columns(found):
    read_all("a.jsonl", "\n".join(map(json.dumps, found)).encode())


COMMAND = "\x1b]0;owned\x07\x1b[2J\u202e"


@pytest.mark.parametrize(
    "content",
    [
        f"{COMMAND}a,b\n1,2\n",
        f"{COMMAND},{COMMAND}\n1,2\n",
        f"text,label\nx,{COMMAND}\ny,a\n",
        f"prompt,completion\n{COMMAND},y\n",
    ],
)
def test_no_message_commands_the_terminal(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        found = read("a.csv", tmp_path)
        refuse_rows([*found.bad, *read_records(found.rows, recognise(found.rows))[1]])
    assert not set(COMMAND) & {"\x1b", "\x07", "\u202e"} & set(str(caught.value))


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_file(ending):
    read_all(f"a{ending}", b"")
