"""Every text and flag of a row reaches the rendered text, or is named as left out; what means the same is the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizers import CHATML, GEMMA, QWEN3, all_kinds, byte_level

from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Prepared
from finetune.data.tokenizer import encode_prompt
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of

CALLS = (
    "{% for t in tools or [] %}[TOOL]{{ t.function | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[CALL]{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NINE = CALLS.replace(
    "[CALL]", "{% if not c.id or c.id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}[CALL]"
)
PARAMETERS = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
TRACK = {
    "type": "function",
    "function": {"name": "track", "description": "Finds a parcel.", "parameters": PARAMETERS},
}
CALL = {"id": "call_0123456789", "type": "function", "function": {"name": "track", "arguments": {"id": "7"}}}
TALK = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0123456789", "content": '{"place": "hub"}'},
    {"role": "assistant", "content": "At the hub."},
]
ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def told(folder: Path, rows: list[Any] | str, template: str = CHATML, **sections: Any) -> Prepared:
    """rows: objects, or a file's name; they are trained on, and measured too."""
    if not isinstance(rows, str):
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = "rows.jsonl"
    data = {"train": rows, "valid": rows} | sections.pop("data", {})
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": data, **sections})
    found = result_of(prepare(recipe, byte_level(template), base=folder))
    refuse(found, recipe)
    return found


def text(found: Prepared, row: int = 0) -> str:
    return str(byte_level().decode(found.train.examples[row].tokens))


def learned(found: Prepared, row: int = 0) -> str:
    example = found.train.examples[row]
    return str(byte_level().decode(example.tokens[example.weights > 0]))


def arrays(found: Prepared) -> list[Any]:
    return [(one.tokens.tolist(), one.weights.tolist()) for one in found.train.examples]


ROWS: dict[str, dict[str, Any]] = {
    "chat": {
        "id": 7, "source": "x", "meta": {"url": "y", "tags": ["z"]}, "system": "s", "tools": [TRACK],
        "messages": [
            {"role": "user", "content": "q", "name": "n", "time": 3, "parts": {"a": ["b"]}, "train": True},
            {"role": "assistant", "content": "a", "thinking": "t", "weight": 1, "rating": 0.5, "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "r", "cache": "c"}], "tool_call_id": "i"},
            {"role": "assistant", "content": "b", "reasoning": "t", "reasoning_content": "u", "flag": True},
            {"role": "user", "content": "after"},
        ],
    },
    "sharegpt": {
        "url": "x", "system_prompt": "s",
        "tools": [{"name": "f", "description": "d", "parameters": {"type": "object"}}],
        "history": [["q0", "a0"]],
        "conversations": [
            {"from": "human", "value": "q", "lang": "en"}, {"from": "gpt", "value": "a", "thought": "t", "score": "s"},
        ],
    },
    "alpaca": {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["q", "a"]], "lang": "en"},
    "prompt": {"prompt": "p", "completion": "c", "system_prompt": "s", "history": [["q", "a"]], "rating": "r"},
    "lists": {"prompt": [{"role": "user", "content": "p", "n": "x"}], "completion": ASKED[1:], "system": "s", "o": 1},
    "classification": {"text": "t", "label": "l", "system": "s", "title": "x", "history": "h"},
    "text": {"text": "t", "title": "x", "author": {"name": "n"}},
}  # fmt: skip
STRUCTURE = {"role", "from", "type", "weight", "train", "flag", "label"}


def planted(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(field, the value with a marker there) for every text and number in it."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in STRUCTURE:
                yield from ((field, value | {key: new}) for field, new in planted(one, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from ((field, [*value[:number], new, *value[number + 1 :]]) for field, new in planted(one, name))
    elif isinstance(value, (int, float)):
        yield name, 987654
    else:
        yield name, "987654"


@pytest.mark.parametrize("template", ["chat", "plain", "auto"])
@pytest.mark.parametrize("kind", ROWS)
def test_each_field_is_in_the_text_or_named(tmp_path: Path, kind: str, template: str) -> None:
    if (kind, template) == ("text", "chat"):
        return
    other = {"label": "other"} if kind == "classification" else {}
    marked = list(planted(ROWS[kind]))
    rows = [row for _, row in marked]
    found = told(
        tmp_path, [*rows, ROWS[kind] | other], CALLS, prompt={"template": template}, train={"max_length": 4096}
    )
    lost = {name.replace("[]", "").rsplit(".", 1)[-1] for name in found.train.left_out_fields}
    whole = {"meta", "author", "tools"} & set(found.train.left_out_fields)
    within = {field for name in whole for field, _ in planted({name: ROWS[kind][name]})}
    thoughts = (
        {"thinking", "reasoning", "reasoning_content", "thought"} if "thoughts" in found.train.left_out_fields else ()
    )
    assert len(found.train.examples) == len(rows) + 1
    for number, (field, _) in enumerate(marked):
        assert "987654" in text(found, number) or field in {*lost, *within, *thoughts}, field
    flags = {"chat": {"messages[].train", "messages[].flag"}}.get(kind, set())
    assert flags <= set(found.train.left_out_fields)


def test_what_no_text_holds_is_one_short_line(tmp_path: Path) -> None:
    rows = [{"id": n, "url": "x", "source": "y", "messages": [*ASKED[:1], ASKED[1] | {"t": 5 + n}]} for n in range(3)]
    found = told(tmp_path, rows)
    assert found.train.left_out_fields == {"id": 3, "url": 3, "source": 3, "messages[].t": 3}
    line = "left out, since no part of the text holds it: id, url, source, messages[].t"
    assert [note for note in found.train.notes if "left out" in note] == [line]
    assert not told(tmp_path, [{"messages": ASKED}]).train.left_out_fields


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ({"system": "Be warm.", "messages": ASKED}, "<|im_start|>system\nBe warm.<|im_end|>\n<|im_start|>user\n2+2?"),
        ({"system_prompt": "Be warm.", "conversations": ASKED}, "<|im_start|>system\nBe warm.<|im_end|>\n"),
        ({"system": " ", "messages": ASKED}, "<|im_start|>user"),
        (
            {"instruction": "And 3?", "input": "", "output": "6", "system": "Be warm.", "history": [["2?", "4"]]},
            "Be warm.\n\n### Instruction:\n2?\n\n### Response:\n4\n\n### Instruction:\nAnd 3?\n\n### Response:\n6",
        ),
        (
            {"prompt": "And 3?", "completion": " 6", "system": "Be warm.", "history": [["2?", "4"]]},
            "Be warm.\n\n2?\n4\n\nAnd 3? 6",
        ),
        (
            {"conversations": ASKED, "history": [["2?", "5"]]},
            "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\n2+2?",
        ),
    ],
)  # fmt: skip
def test_system_and_history_stand_before_the_question(tmp_path: Path, row: dict[str, Any], start: str) -> None:
    found = told(tmp_path, [row])
    assert text(found).startswith(start) and not found.train.left_out_fields
    assert learned(found) in ("4<|im_end|>", "6</s>", " 6</s>")  # earlier turns are not learned


def test_the_system_column_by_another_name_and_beside_a_message(tmp_path: Path) -> None:
    row = {"persona": "Be warm.", "messages": ASKED}
    assert text(told(tmp_path, [row], data={"columns": {"system": "persona"}})).startswith(
        "<|im_start|>system\nBe warm."
    )
    both = {"system": "Be cold.", "messages": [{"role": "system", "content": "Be warm."}, *ASKED]}
    found = told(tmp_path, [both])
    assert "Be cold" not in text(found) and found.train.left_out_fields == {"system": 1}
    chat = told(tmp_path, [{"instruction": "2+2?", "output": "4", "system": "Be warm."}], prompt={"template": "chat"})
    assert text(chat).startswith("<|im_start|>system\nBe warm.")


NAMES = ("reasoning_content", "thinking", "reasoning", "thought")


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("read", NAMES)
def test_thoughts_reach_the_template_under_the_name_it_reads(tmp_path: Path, given: str, read: str) -> None:
    template = CHATML.replace("m.content", f"((m.{read} | default('')) + '|' + m.content)")
    found = told(tmp_path, [{"messages": [ASKED[0], ASKED[1] | {given: "I add."}]}], template)
    assert learned(found) == "I add.|4<|im_end|>" and not found.train.left_out_fields


@pytest.mark.parametrize("content", ["4", [{"type": "thinking", "thinking": "I add."}, {"type": "text", "text": "4"}]])
def test_thoughts_without_a_place_are_counted(tmp_path: Path, content: Any) -> None:
    given = {} if isinstance(content, list) else {"thinking": "I add."}
    rows = [{"messages": [ASKED[0], {"role": "assistant", "content": content} | given]}, {"messages": ASKED}]
    found = told(tmp_path, rows)
    assert found.train.left_out_fields == {"thoughts": 1} and "1 of 2 rows" in found.train.notes[-1]
    assert "learns to answer without them" in found.train.notes[-1]


def test_tools_that_the_template_drops_are_counted(tmp_path: Path) -> None:
    found = told(tmp_path, [{"messages": ASKED, "tools": [TRACK]}, {"messages": ASKED}])
    assert found.train.left_out_fields == {"tools": 1}
    assert any("1 of 2 rows: the template does not write the tools" in note for note in found.train.notes)
    assert not told(tmp_path, [{"messages": ASKED, "tools": [TRACK]}], CALLS).train.left_out_fields


def test_parquet_and_jsonl_give_the_same_tokens(tmp_path: Path) -> None:
    weigh = {
        "type": "function",
        "function": {"name": "weigh", "parameters": {"properties": {"kilos": {"type": "number"}}}},
    }
    second = {
        "id": "b",
        "type": "function",
        "function": {"name": "weigh", "arguments": {"kilos": 1.5, "of": {"box": "x"}}},
    }
    third = {"id": "c", "type": "function", "function": {"name": "weigh", "arguments": {"of": {"lid": "y"}}}}
    rows = [{"messages": TALK, "tools": [TRACK, weigh]}]
    rows += [
        {"messages": [TALK[0], TALK[1] | {"tool_calls": [call]}, *TALK[2:]], "tools": [weigh]}
        for call in (second, third)
    ]
    rows += [{"messages": [*ASKED], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    padded = told(tmp_path, "rows.parquet", CALLS)
    assert arrays(padded) == arrays(told(tmp_path, rows, CALLS)) and "null" not in text(padded)


def test_a_null_that_jsonl_has_itself_stays(tmp_path: Path) -> None:
    call = CALL | {"function": {"name": "track", "arguments": {"id": None}}}
    found = told(tmp_path, [{"messages": [TALK[0], TALK[1] | {"tool_calls": [call]}, *TALK[2:]]}], CALLS)
    assert '{"id": null}' in text(found)


def sharegpt(*turns: tuple[str, Any], tools: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": tools}


BARE_CALL = {"name": "track", "arguments": {"id": "7"}}
WRITTEN = [("human", "Where is it?"), ("function_call", json.dumps(BARE_CALL)), ("observation", '{"place": "hub"}')]


@pytest.mark.parametrize(
    "row",
    [
        sharegpt(*WRITTEN, ("gpt", "At the hub."), tools=json.dumps([TRACK["function"]])),
        sharegpt(*WRITTEN, ("gpt", "At the hub."), tools=[TRACK["function"]]),
        sharegpt(
            WRITTEN[0], ("tool_call", json.dumps([BARE_CALL | {"arguments": '{"id": "7"}'}])),
            ("ipython", WRITTEN[2][1]),
            ("gpt", "At the hub."), tools=[json.dumps(TRACK)],
        ),
        {"messages": [TALK[0], TALK[1] | {"tool_calls": [BARE_CALL]}, *TALK[2:]],
         "tools": [{"name": "track", "description": "Finds a parcel.", "input_schema": PARAMETERS}]},
        {"messages": [TALK[0], {"role": "assistant", "function_call": BARE_CALL}, *TALK[2:]],
         "functions": [TRACK["function"]]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [CALLS, NINE])
def test_calls_written_in_any_way_are_the_same_tokens(tmp_path: Path, row: dict[str, Any], template: str) -> None:
    assert arrays(told(tmp_path, [row], template)) == arrays(
        told(tmp_path, [{"messages": TALK, "tools": [TRACK]}], template)
    )


def test_words_and_calls_that_follow_each_other_are_one_turn(tmp_path: Path) -> None:
    call = ("function_call", json.dumps(BARE_CALL))
    row = sharegpt(WRITTEN[0], ("gpt", "I look."), call, call, WRITTEN[2], WRITTEN[2], ("gpt", "At the hub."), tools=[])
    calls = [CALL | {"id": "a"}, CALL | {"id": "b"}]
    said = [TALK[0], {"role": "assistant", "content": "I look.", "tool_calls": calls}, TALK[2], TALK[2], TALK[3]]
    assert arrays(told(tmp_path, [row], CALLS)) == arrays(told(tmp_path, [{"messages": said}], CALLS))
    with pytest.raises(DataError, match=r"rows.jsonl:1: conversations\[1\]: .*JSON of name and arguments"):
        told(
            tmp_path, [sharegpt(WRITTEN[0], ("function_call", "track it"), *WRITTEN[2:], ("gpt", "x"), tools=[])], CALLS
        )


def test_ids_are_renamed_within_a_row_where_the_template_refuses_them(tmp_path: Path) -> None:
    shown = NINE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_call_id }}").replace("[CALL]", "[CALL]{{ c.id }}")
    two = [TALK[1] | {"tool_calls": [CALL, CALL | {"id": "call_x"}]}, TALK[2] | {"tool_call_id": "call_x"}, TALK[2]]
    found = told(tmp_path, [{"messages": [TALK[0], *two, TALK[3]]}, {"messages": TALK}], shown)
    assert [text(found).count(name) for name in ("call00001", "call00002", "call_")] == [2, 2, 0]
    assert text(found).index("hub") < text(found).index("call00002", text(found).index("hub"))
    fits = [
        TALK[0],
        TALK[1] | {"tool_calls": [CALL | {"id": "abcdefghi"}]},
        TALK[2] | {"tool_call_id": "abcdefghi"},
        TALK[3],
    ]
    assert text(told(tmp_path, [{"messages": fits}], shown)).count("abcdefghi") == 2
    with pytest.raises(DataError, match=r"refuses this conversation .System role not supported"):
        told(tmp_path, [{"messages": [{"role": "system", "content": "s"}, *TALK]}], GEMMA)


@pytest.mark.parametrize(
    ("flag", "is_learned"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": False}, False), ({"loss_weight": 0.0}, False),
        ({"train": False}, False), ({"training": "true"}, True), ({"training": False}, False),
        ({"masked": True}, False),
        ({"mask": 0}, True), ({"learn": "False"}, False), ({"weight": 0, "masked": True}, False),
    ],
)  # fmt: skip
def test_flags_of_turns(tmp_path: Path, flag: dict[str, Any], is_learned: bool) -> None:
    row = {"messages": [ASKED[0] | {"weight": 0}, ASKED[1] | flag, {"role": "user", "content": "so?"}, TALK[3]]}
    found = told(tmp_path, [row])
    assert learned(found) == ("4<|im_end|>" if is_learned else "") + "At the hub.<|im_end|>"
    assert not found.train.left_out_fields


def test_flags_that_cannot_be_heeded(tmp_path: Path) -> None:
    for flags, said in (({"weight": 0.5}, "weight 0.5 must be 0"), ({"train": True, "masked": True}, "disagree")):
        with pytest.raises(DataError, match=said):
            told(tmp_path, [{"messages": [ASKED[0], ASKED[1] | flags]}])


SYSTEM = {"role": "system", "content": ""}
HELLO = {"role": "assistant", "content": "Welcome."}


def test_an_empty_system_message_counts_as_none(tmp_path: Path) -> None:
    found = told(tmp_path, [{"messages": [SYSTEM, *ASKED]}, {"messages": ASKED}])
    assert arrays(found)[0] == arrays(found)[1] and "empty system messages (1 rows)" in found.train.notes[-1]
    asked = told(tmp_path, [{"messages": [SYSTEM, *ASKED]}], prompt={"system": "Be warm."})
    assert text(asked).startswith("<|im_start|>system\nBe warm.")


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "s"}], [SYSTEM]])
def test_a_greeting_is_a_turn_that_is_not_learned(tmp_path: Path, before: list[Any]) -> None:
    found = told(tmp_path, [{"messages": [*before, HELLO, *ASKED]}])
    assert "assistant\nWelcome.<|im_end|>" in text(found) and learned(found) == "4<|im_end|>"
    wanted = told(tmp_path, [{"messages": [*before, HELLO | {"train": True}, *ASKED]}])
    assert learned(wanted) == "Welcome.<|im_end|>4<|im_end|>"


def test_a_greeting_that_cannot_be(tmp_path: Path) -> None:
    alternate = "{% if messages[0].role == 'assistant' %}{{ raise_exception('users begin') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*users begin"):
        told(tmp_path, [{"messages": [HELLO, *ASKED]}, {"messages": ASKED}], alternate)
    with pytest.raises(DataError, match="no assistant turn to learn from"):
        told(tmp_path, [{"messages": [HELLO]}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED[:1], "completion": ASKED[1:]}, {"prompt": "2+2?", "completion": ASKED[1:]},
        {"prompt": ASKED[:1], "completion": "4"}, {"prompt": ASKED[:1], "completion": ASKED[1]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("wanted", ["auto", "chat", "prompt"])
def test_lists_as_prompt_and_completion_are_a_conversation(tmp_path: Path, row: dict[str, Any], wanted: str) -> None:
    found = told(tmp_path, [row, {"prompt": ASKED[:1], "completion": ASKED[1:]}], data={"format": wanted})
    assert found.format == "chat" and arrays(found)[0] == arrays(told(tmp_path, [{"messages": ASKED}]))[0]


def test_of_a_prompt_in_messages_only_the_completion_is_learned(tmp_path: Path) -> None:
    row = {
        "prompt": [*ASKED, {"role": "user", "content": "And 3?"}],
        "completion": [{"role": "assistant", "content": "6"}],
    }
    assert learned(told(tmp_path, [row])) == "6<|im_end|>"


@pytest.mark.parametrize("depth", [200, 100_000])
@pytest.mark.parametrize("where", ["messages", "arguments", "tools", "field"])
def test_deep_values_are_bad_rows(tmp_path: Path, where: str, depth: int) -> None:
    deep: Any = '{"a":' * depth + "1" + "}" * depth
    messages: Any = copy.deepcopy(TALK)
    row = {"messages": messages, "tools": [TRACK]}
    if where == "messages":
        row["messages"] = deep
    elif where == "arguments":
        messages[1]["tool_calls"][0]["function"]["arguments"] = deep
    elif where == "tools":
        row["tools"] = f"[{deep}]"
    elif depth > 200:
        return  # the line itself cannot be read then
    else:
        messages[0]["note"] = json.loads(deep)
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*(nested too deeply|must be a list of at least)"):
        told(tmp_path, [row, {"messages": ASKED}], CALLS)


OPENS = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")


@pytest.mark.parametrize("template", [OPENS, QWEN3.replace("<think>\\n\\n</think>\\n\\n", "").replace(
    "assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")])  # fmt: skip
def test_a_prompt_that_opens_a_thought(tmp_path: Path, template: str) -> None:
    two = [*ASKED, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "<b>4</b>"}]
    found = told(tmp_path, [{"messages": two}], template)
    assert [learned(found, row) for row in (0, 1)] == ["\n</think>\n\n4<|im_end|>", "\n</think>\n\n<b>4</b><|im_end|>"]
    assert all(example.prompt.endswith("assistant\n<think>\n") for example in found.train.examples)
    assert "assistant\n4<|im_end|>" in found.train.examples[1].prompt


@pytest.mark.parametrize(
    "answer", [{"content": "4", "reasoning_content": "I add."}, {"content": "<think>\nI add.\n</think>\n\n4"}]
)
def test_a_prompt_that_opens_a_thought_goes_on_with_that_of_the_row(tmp_path: Path, answer: dict[str, str]) -> None:
    drops = OPENS.replace("m.content +", "m.content.split('</think>')[-1].strip() +")
    found = told(tmp_path, [{"messages": [ASKED[0], {"role": "assistant", **answer}]}], drops)
    assert learned(found) == "I add.\n</think>\n\n4<|im_end|>" and not found.train.left_out_fields


def test_a_prompt_that_cannot_be_followed_names_its_rows(tmp_path: Path) -> None:
    other = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'now answer: ' }}{% endif")
    two = [*ASKED, {"role": "user", "content": "so?"}, TALK[3]]
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*where the answer begins cannot be known(.|\n)*rows.jsonl:2: "
    ):
        told(tmp_path, [{"messages": two}, {"messages": ASKED}], other)


@pytest.mark.parametrize("kind", all_kinds())
def test_the_line_before_an_answer_belongs_to_the_prompt(tmp_path: Path, kind: str) -> None:
    tokenizer = all_kinds()[kind]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "name it", "output": "good"}))
    data = {"train": "rows.jsonl", "valid": "rows.jsonl"}
    for template in ("alpaca", "plain", "Q: {instruction}\nA:\n"):
        recipe = Recipe.model_validate({"model": {"path": "m"}, "data": data, "prompt": {"template": template}})
        example = result_of(prepare(recipe, tokenizer, base=tmp_path)).train.examples[0]
        assert tokenizer.decode(example.tokens[example.weights > 0]) == "good</s>" and example.prompt.endswith("\n")
        assert example.prompt_tokens.tolist() == encode_prompt(tokenizer, example.prompt)
