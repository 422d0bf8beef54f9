"""What a row is, from the columns of all rows; and every row checked."""

from __future__ import annotations

import pytest

from finetune.data.calls import read_tools
from finetune.data.formats import recognise
from finetune.data.messages import read_messages
from finetune.data.records import read_records
from finetune.data.rows import Row
from finetune.errors import DataError, RecipeError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(*fields: dict) -> list[Row]:
    return [Row(one, "f.jsonl", number) for number, one in enumerate(fields, 1)]


@pytest.mark.parametrize(
    ("fields", "name", "columns"),
    [
        ({"text": "a", "label": 1}, "classification", {"text": "text", "label": "label"}),
        ({"sentence": "a", "label": 1, "id": 3}, "classification", {"text": "sentence", "label": "label"}),
        ({"Review": "a", "Sentiment": "x"}, "classification", {"text": "Review", "label": "Sentiment"}),
        ({"prompt": "a", "completion": "b"}, "prompt", {"prompt": "prompt", "completion": "completion"}),
        ({"question": "a", "answer": "b"}, "prompt", {"prompt": "question", "completion": "answer"}),
        ({"instruction": "a", "output": "b"}, "alpaca", {"instruction": "instruction", "output": "output"}),
        (
            {"instruction": "a", "input": "c", "output": "b", "text": "abc"},
            "alpaca",
            {"instruction": "instruction", "output": "output", "input": "input"},
        ),
        ({"input": "a", "output": "b"}, "prompt", {"prompt": "input", "completion": "output"}),
        ({"messages": CHAT, "text": "x"}, "chat", {"messages": "messages"}),
        ({"id": 1, "conversations": []}, "sharegpt", {"conversations": "conversations"}),
        ({"text": "a", "meta": {}}, "text", {"text": "text"}),
    ],
)
def test_formats_are_recognised(fields, name, columns):
    layout = recognise(rows(fields))
    assert (layout.name, dict(layout.columns)) == (name, columns)
    renamed = [own for standard, own in columns.items() if own != standard]
    assert all(own in layout.notes[0] for own in renamed)


def test_all_rows_decide_not_the_first():
    layout = recognise(rows({"text": "a"}, *[{"prompt": "a", "completion": "b"}] * 3))
    assert layout.name == "prompt"
    _, bad = read_records(rows({"text": "a"}, {"prompt": "a", "completion": "b"}), layout)
    assert bad == [("f.jsonl:1", "prompt, completion is missing, and the other rows are prompt; add it")]


def test_columns_are_mapped():
    layout = recognise(rows({"Comment": "a", "Response": "b"}), "auto", {"prompt": "Comment", "completion": "Response"})
    assert layout.name == "prompt" and layout.columns["prompt"] == "Comment"


@pytest.mark.parametrize(
    ("fields", "wanted", "mapping", "error", "said"),
    [
        ({"a": "x"}, "auto", {}, DataError, r"f.jsonl:1: the columns \(a\) fit no known format"),
        ({"text": "x"}, "chat", {}, DataError, "do not fit data.format chat"),
        ({"review": "x", "content": "y", "label": 1}, "auto", {}, DataError, "fit no known format"),
        ({"messages": CHAT, "prompt": "a", "completion": "b"}, "auto", {}, DataError, "fit chat and prompt; say which"),
        ({"text": "x"}, "auto", {"texts": "text"}, RecipeError, "data.columns.texts: not a standard name"),
        ({"text": "x"}, "auto", {"text": "txt"}, RecipeError, "has no column txt; it has text"),
    ],
)
def test_what_does_not_fit_is_named(fields, wanted, mapping, error, said):
    with pytest.raises(error, match=said):
        recognise(rows(fields), wanted, mapping)


@pytest.mark.parametrize(("label", "written"), [("pos", "pos"), (" pos ", "pos"), (1, "1"), (True, "True"), (1.0, "1")])
def test_labels_are_written_as_text(label, written):
    data = rows({"text": "a", "label": label})
    records, bad = read_records(data, recognise(data))
    assert not bad and records[0].answer == written and records[0].key == "a"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": " ", "label": "x"}, "text is empty"),
        ({"text": "a", "label": ""}, "label is empty"),
        ({"text": "a", "label": None}, "label is missing"),
        ({"text": 3, "label": "x"}, "text is int, and must be text"),
        ({"text": "a", "label": 1.5}, "label is float"),
        ({"text": "a", "label": ["x"]}, "label is list"),
        ({"text": "a\ud800", "label": "x"}, "half a character"),
        ({"text": "a", "label": "other"}, "'other' is not one of x, y"),
    ],
)
def test_bad_rows_have_a_reason(fields, said):
    good = {"text": "fine", "label": "x"}
    data = rows(good, fields)
    records, bad = read_records(data, recognise(data), ["x", "y"])
    assert len(records) == 1 and bad[0][0] == "f.jsonl:2" and said in bad[0][1]


def turns(roles: str) -> list[dict]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": letter} for letter in roles]


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "uatau", "uatta", "aua", "saua"])
def test_good_conversations(roles):
    assert len(read_messages(turns(roles), "messages")) == len(roles)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("uua", r"\[1\]: user cannot stand after user"),
        ("au", "no assistant turn to learn from"),
        ("sa", "no assistant turn to learn from"),
        ("tu", r"\[0\]: tool cannot stand first"),
        ("uaa", r"\[2\]: assistant cannot stand after assistant"),
        ("usa", r"\[1\]: system cannot stand after user"),
        ("u", "no assistant turn"),
        ("", "must be a list"),
    ],
)
def test_role_grammar(roles, said):
    with pytest.raises(ValueError, match=said):
        read_messages(turns(roles), "messages")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'"),
        ({"content": "x"}, "unknown role None"),
        ("hello", "must be an object"),
        ({"role": "assistant", "content": ""}, r"\[1\] \(assistant\) is empty"),
        ({"role": "assistant", "content": None}, "is empty"),
        ({"role": "assistant", "content": 3}, "content is int"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "part of type image_url"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight 0.5 must be 0"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "a tool call must have a function"),
        ({"role": "assistant", "content": "\udfff"}, "half a character"),
    ],
)
def test_bad_messages(message, said):
    with pytest.raises(ValueError, match=said):
        read_messages([{"role": "user", "content": "a"}, message], "messages")


def test_messages_come_in_one_shape():
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    found = read_messages(
        [
            {"from": "human", "value": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call], "function_call": None},
            {"role": "tool", "content": [{"type": "text", "text": "b"}, {"type": "text", "value": "c"}, "d"]},
            {"from": "gpt", "value": "e", "loss_weight": 0.0, "content": None},
        ],
        "messages",
    )
    assert found == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "bcd"},
        {"role": "assistant", "content": "e", "weight": 0},
    )
    old = {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}
    assert read_messages([{"role": "user", "content": "a"}, old], "m")[1]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {},
    }


def test_functions_become_tools():
    assert read_tools({"functions": [{"name": "f"}]}, {}) == ({"type": "function", "function": {"name": "f"}},)
    assert read_tools({"tools": '[{"type": "function"}]'}, {}) == ({"type": "function"},)
    with pytest.raises(ValueError, match="tools must be a list"):
        read_tools({"tools": {"a": 1}}, {})
