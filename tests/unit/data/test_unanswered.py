"""Rows to be answered get the very prompt that training gives them, in every format; an answer there is not read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune.data.prepare import prepare
from finetune.data.problems import BadSource
from finetune.data.prompt_parts import always_filled
from finetune.data.read import read
from finetune.data.rows import Prepared, Row, Rows
from finetune.data.unanswered import unanswered
from finetune.recipe.schema import Recipe
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of

R1 = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"  # noqa: E501
LONG = "a film that goes on and on and on and never ends"


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def shared(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "labels": ([{"text": f"film {i} ", "label": ("good", "bad")[i % 2]} for i in range(6)], {}),
    "labels, long": (
        [{"text": f"{i} {LONG}", "label": ("good", "bad")[i % 2]} for i in range(6)],
        {"train": {"max_length": 24}},
    ),
    "labels of another name": (
        [{"review": f"film {i}", "stars": i % 3} for i in range(6)],
        {"data": {"columns": {"text": "review", "label": "stars"}}},
    ),
    "labels in a chat": (
        [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(6)],
        {"prompt": {"template": "chat"}},
    ),
    "prompts": ([{"prompt": f"{i}? ", "completion": "an answer"} for i in range(4)], {}),
    "prompts with a system text": ([{"system": "be", "prompt": f"{i}?", "completion": "y"} for i in range(4)], {}),
    "instructions": ([{"instruction": f"do {i}", "input": f"{i}" * (i % 2), "output": "done"} for i in range(6)], {}),
    "conversations": ([{"messages": said("one?", "two", f"three {i}?", "four")} for i in range(4)], {}),
    "conversations of ShareGPT": ([{"conversations": shared("a?", "b", f"{i}?", "d")} for i in range(4)], {}),
    "long conversations": (
        [{"messages": said("one?", "two", f"three {i}?", "four")} for i in range(4)],
        {"train": {"max_length": 60}},
    ),
    "a template of one's own": (
        [{"title": "t", "prompt": f"{i}?", "completion": "y"} for i in range(4)],
        {"prompt": {"template": "<{title}> {prompt}\n=>"}},
    ),
}


def of(rows: list[dict[str, Any]], more: Mapping[str, Any], folder: Path, template: str = CHATML) -> Prepared:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(more)
    return result_of(prepare(recipe, byte_level(template), base=folder))


def recipe_of(more: Mapping[str, Any]) -> Recipe:
    data = {"train": "train.jsonl", "test": "train.jsonl", **more.get("data", {})}
    return Recipe.model_validate({"model": {"path": "m"}, **more, "data": data})


def asked(
    trained: Prepared, more: Mapping[str, Any], rows: list[dict[str, Any]], template: str = CHATML
) -> tuple[Prepared, list[Row]]:
    recipe = recipe_of(more)
    data = recipe.data.model_copy(update={"format": trained.format})
    recipe = recipe.model_copy(update={"data": data, "task": trained.task})
    source = Rows([Row(row, "new.jsonl", 7) for row in rows], [])  # all on one line, as in a list of JSON
    always = always_filled(trained.renderer, trained.format, trained.train.records)
    return result_of(unanswered(recipe, byte_level(template), source, trained.labels, always, None))


def without_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in row.items() if key not in ("label", "stars", "completion", "output")}
    return {key: value[:-1] if isinstance(value, list) else value for key, value in left.items()}


def prompts(prepared: Prepared) -> list[list[int]]:
    return [example.prompt_tokens.tolist() for example in prepared.held_out.examples]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_that_of_training(tmp_path: Path, kind: str) -> None:
    rows, more = KINDS[kind]
    trained = of(rows, more, tmp_path)
    last = {one.prompt: one.prompt_tokens.tolist() for one in trained.held_out.examples}
    found, sources = asked(trained, more, [without_answer(row) for row in rows])
    assert prompts(found) == list(last.values())
    assert [source.fields for source in sources] == [without_answer(row) for row in rows]
    assert {example.location for example in found.held_out.examples} == {"new.jsonl:7"}
    assert (found.labels, found.label_tokens) == (trained.labels, trained.label_tokens)
    answered, _ = asked(trained, more, rows)
    assert prompts(answered) == prompts(found), "an answer in the row changes something"


def test_a_prompt_that_opens_a_thought_is_that_of_training(tmp_path: Path) -> None:
    rows = [{"messages": said(f"{i}?", "yes")} for i in range(4)]
    trained = of(rows, {}, tmp_path, R1)
    found, _ = asked(trained, {}, [without_answer(row) for row in rows], R1)
    assert prompts(found) == prompts(trained)


def test_plain_text_goes_on_from_its_end(tmp_path: Path) -> None:
    trained = of([{"text": f"film {i}"} for i in range(4)], {}, tmp_path)
    found, _ = asked(trained, {"train": {"max_length": 8}}, [{"text": "short"}, {"text": LONG}])
    decode = byte_level(CHATML).decode
    short, long = (decode(tokens, skip_special_tokens=True) for tokens in prompts(found))
    assert short == "short" and len(prompts(found)[1]) == 8 and LONG.endswith(long) and long


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("labels", {"txt": "x"}, r"rows with text, and there is no such column \(txt\)"),
        ("labels of another name", {"stars": 1}, "rows with review, and"),
        ("prompts", {"completion": "x"}, "rows with prompt, and"),
        ("instructions", {"input": "x"}, "rows with instruction, and"),
        ("conversations", {"talk": []}, "rows with messages, and"),
        ("a template of one's own", {"prompt": "x"}, "title"),
    ],
)
def test_a_column_that_is_missing_is_one_error(tmp_path: Path, kind: str, row: dict[str, Any], words: str) -> None:
    rows, more = KINDS[kind]
    trained = of([row | {"title": f"t{i}"} if "title" in row else row for i, row in enumerate(rows)], more, tmp_path)
    with pytest.raises(BadSource, match=rf"new\.jsonl:1: .*{words}"):
        asked(trained, more, [row, row])


@pytest.mark.parametrize("kind", ["a template of one's own", "prompts with a system text"])
def test_what_all_training_rows_shared_is_filled_in(tmp_path: Path, kind: str) -> None:
    rows, more = KINDS[kind]
    trained = of(rows, more, tmp_path)
    found, _ = asked(trained, more, [{"prompt": row["prompt"]} for row in rows])
    assert prompts(found) == prompts(trained)


def test_bad_rows_stand_with_their_reasons_and_others_keep_their_row(tmp_path: Path) -> None:
    rows, more = KINDS["conversations"]
    trained = of(rows, more, tmp_path)
    given = [{"messages": []}, rows[0], {"messages": None}, {"messages": said("", "x")}, rows[1], {"messages": "hello"}]
    found, sources = asked(trained, more, given)
    assert [source.fields for source in sources] == [rows[0], rows[1], {"messages": "hello"}]
    assert sorted(reason[:40] for _, reason in found.held_out.bad) == [
        "messages: no turn of a user to answer; a",
        "messages: no turn of a user to answer; a",
        "messages[0] (user) is empty; give it som",
    ]


@pytest.mark.parametrize("name", ["new.csv", "new.json", "new.jsonl"])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    rows, more = KINDS["labels"]
    trained = of(rows, more, tmp_path)
    texts = [row["text"] for row in rows]
    (tmp_path / "new.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "new.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = read(name, tmp_path, "test")
    recipe = recipe_of(more)
    data = recipe.data.model_copy(update={"format": trained.format})
    recipe = recipe.model_copy(update={"data": data, "task": trained.task})
    found, _ = result_of(unanswered(recipe, byte_level(CHATML), source, trained.labels, {}, None))
    assert prompts(found) == prompts(trained)
