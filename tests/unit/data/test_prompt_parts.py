"""A question can be asked with all that training gave beside it, and never without it unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.commands.chat import beside
from finetune.data.prepare import prepare
from finetune.data.prompt_parts import Beside, always_filled, completed
from finetune.data.renderers import needed, question_tokens
from finetune.data.rows import Prepared
from finetune.disk.run_folder import RunFolder
from finetune.errors import DataError, Incompatible, RecipeError
from finetune.recipe.schema import Recipe
from finetune.report.summary import account_of
from tests.unit.data.toy_tokenizers import byte_level
from tests.unit.toy_run import result_of

TOOLS_CHAT = (
    "{% if tools %}{{ 'T' + (tools | tojson) }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}
Rows = list[dict[str, Any]]


def talk(question: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "good"}], **more}


OWN = "Title: {title}\nBody: {body}\n{prompt}\n"
CASES: dict[str, tuple[Rows, dict[str, Any], str, Beside]] = {
    "input": (
        [{"instruction": f"name {i}", "input": f"film {i}", "output": "good"} for i in range(4)],
        {},
        "name 0",
        Beside({"input": "film 0"}),
    ),
    "input in a chat": (
        [{"instruction": f"name {i}", "input": f"film {i}", "output": "good"} for i in range(4)],
        {"template": "chat"},
        "name 0",
        Beside({"input": "film 0"}),
    ),
    "own template": (
        [{"prompt": f"name {i}", "title": f"t {i}", "body": f"b {i}", "completion": "x"} for i in range(4)],
        {"template": OWN},
        "name 0",
        Beside({"title": "t 0", "body": "b 0"}),
    ),
    "system beside a prompt": (
        [{"prompt": f"name {i}", "system": f"Be {i}.", "completion": "x"} for i in range(4)],
        {},
        "name 0",
        Beside(system="Be 0."),
    ),
    "system of a conversation": (
        [talk(f"name {i}", system=f"Be {i}.") for i in range(4)],
        {},
        "name 0",
        Beside(system="Be 0."),
    ),
    "tools": (
        [talk(f"name {i}", tools=[TOOL, *[TOOL] * (i % 2)]) for i in range(4)],
        {},
        "name 0",
        Beside(tools=(TOOL,)),
    ),
}


def made(folder: Path, rows: Rows, prompt: dict[str, Any], **data: Any) -> tuple[Recipe, Prepared]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"path": "m"}, "data": {"train": "rows.jsonl", "valid": "rows.jsonl", **data}, "prompt": prompt}
    recipe = Recipe.model_validate(values)
    found = result_of(prepare(recipe, byte_level(TOOLS_CHAT), base=folder))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": found.format})}), found


def always(found: Prepared) -> dict[str, str | None]:
    return always_filled(found.renderer, found.format, found.train.records)


def asked(recipe: Recipe, question: str, given: Beside) -> list[int]:
    return question_tokens(recipe, byte_level(TOOLS_CHAT), [{"role": "user", "content": question}], beside=given)


@pytest.mark.parametrize("kind", CASES)
def test_the_question_has_the_very_tokens_of_training(tmp_path: Path, kind: str) -> None:
    rows, prompt, question, given = CASES[kind]
    recipe, found = made(tmp_path, rows, prompt)
    full, shared = completed(given, always(found))
    assert asked(recipe, question, full) == found.train.examples[0].prompt_tokens.tolist()
    assert shared == []


@pytest.mark.parametrize("kind", CASES)
def test_what_every_row_had_and_nobody_gives_is_named(tmp_path: Path, kind: str) -> None:
    rows, prompt, _, given = CASES[kind]
    _, found = made(tmp_path, rows, prompt)
    missing = [*given.columns, *(["system"] if given.system else []), *(["tools"] if given.tools else [])]
    with pytest.raises(DataError, match=f"every training row had {', '.join(sorted(missing))}, and this question"):
        completed(Beside(), always(found))
    empty, _ = completed(Beside(dict.fromkeys(given.columns, ""), "", (TOOL,)), always(found))
    assert empty.system == ""  # given as empty is given


@pytest.mark.parametrize("kind", CASES)
def test_what_some_rows_lack_is_not_asked_for(tmp_path: Path, kind: str) -> None:
    rows, prompt, _, given = CASES[kind]
    lacking = [dict(row) for row in rows]
    for name in ("input", "title", "body", "system", "tools"):
        lacking[2].pop(name, None)
    _, found = made(tmp_path, lacking, prompt)
    assert always(found) == {}
    assert completed(given, {}) == (given, [])


def test_what_all_rows_share_is_given_again(tmp_path: Path) -> None:
    rows = [talk(f"name {i}", system="Be brief.", tools=[TOOL]) for i in range(4)]
    recipe, found = made(tmp_path, rows, {})
    full, shared = completed(Beside(), always(found))
    assert shared == ["system", "tools"]
    assert asked(recipe, "name 0", full) == found.train.examples[0].prompt_tokens.tolist()
    other, shared = completed(Beside(system="Be long."), always(found))
    assert (other.system, shared) == ("Be long.", ["tools"])


def test_a_column_may_be_named_as_in_the_file_or_by_its_part(tmp_path: Path) -> None:
    rows = [{"instruction": f"name {i}", "Context": f"film {i}", "output": "x"} for i in range(4)]
    columns = {"instruction": "instruction", "input": "Context", "output": "output"}
    recipe, found = made(tmp_path, rows, {}, columns=columns)
    expected = found.train.examples[0].prompt_tokens.tolist()
    for name in ("input", "Context"):
        assert asked(recipe, "name 0", Beside({name: "film 0"})) == expected


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("input", Beside({"inptu": "x"}), "--column inptu: not in the prompts of this run; there are input"),
        ("tools", Beside({"input": "x"}), "there are none beside the question"),
        ("own template", Beside(system="x"), "--system: the prompts of this run have no system text"),
        ("input", Beside(tools=(TOOL,)), "--tools: the prompts of this run have no tools"),
    ],
)
def test_what_the_prompts_have_no_room_for_is_refused(tmp_path: Path, kind: str, given: Beside, words: str) -> None:
    rows, prompt, question, _ = CASES[kind]
    recipe, _ = made(tmp_path, rows, prompt)
    with pytest.raises(RecipeError, match=words):
        asked(recipe, question, given)


def test_a_run_records_it_and_an_earlier_run_asks_for_the_columns_of_its_own_template(tmp_path: Path) -> None:
    rows, prompt, _, _ = CASES["own template"]
    recipe, found = made(tmp_path, rows, prompt)
    run = RunFolder(tmp_path)
    assert run.always() is None
    run.write_json("data.json", account_of(found))
    assert run.always() == {"title": None, "body": None}
    assert needed(recipe) == {"title": None, "body": None}
    earlier = account_of(found)
    del earlier["always"]
    run.write_json("data.json", earlier)
    assert run.always() is None
    run.write_json("data.json", {"labels": [], "always": [1]})
    with pytest.raises(Incompatible, match=r"data\.json: not what a run writes"):
        run.always()


def test_what_the_command_line_gives(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL["function"]]))
    assert beside(["input=a=b", "title="], "Be.", file) == Beside({"input": "a=b", "title": ""}, "Be.", (TOOL,))
    with pytest.raises(RecipeError, match="--column input: write NAME=TEXT"):
        beside(["input"], None, None)
    for text in ("{", "[]", "[1]", '{"name": "track"}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"tools\.json: "):
            beside([], None, file)
    with pytest.raises(DataError, match="nowhere: No such file"):
        beside([], None, tmp_path / "nowhere")
