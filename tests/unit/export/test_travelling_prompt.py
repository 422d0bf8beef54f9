"""The prompt that travels with an export writes what the run's own code writes, token for token."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.data.conversation import Conversation
from finetune.data.prepare import prepare
from finetune.data.prompt_parts import always_filled
from finetune.data.rows import Prepared
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import Tokenizer, encode, encode_prompt, end_of_turn
from finetune.export.prompt import PROBES, Prompts
from finetune.recipe.schema import Recipe
from tests.unit.chat_families import FAMILIES, tokenizer_of
from tests.unit.toy_run import result_of

CLOCK = datetime(2026, 3, 9, 12, 0)
REVIEWS = [{"text": f"a fine film {i} ", "label": ("good", "bad")[i % 2]} for i in range(4)]
ASKS = [{"prompt": "What is this?", "completion": "It is a"}, {"prompt": "And that?\n", "completion": "It is b"}] * 2
EARLIER = [row | {"system": "Be brief.", "history": [["One?", "1"], ["Two?", "2"]]} for row in ASKS]
ALPACA = [
    {"instruction": "Add", "input": "1 and 2", "output": "3"}, {"instruction": "Say hello", "input": "", "output": "hi"}
] * 2  # fmt: skip
LEADING = [row | {"system": "Sums."} for row in ALPACA]
CONTEXT = [{"q": f"Who {i}?", "about": "Rome" + " II" * i, "prompt": f"{i}", "completion": "he"} for i in range(4)]
SAME = [{"about": "Rome", "prompt": f"Who {i}?", "completion": "he"} for i in range(4)]
TALK = [
    {"messages": [{"role": role, "content": f" {role} {i} "} for role in ("user", "assistant") * 2]} for i in range(4)
]
SYSTEM = [{"messages": [{"role": "system", "content": "Be kind."}, *row["messages"]]} for row in TALK]
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "plain label": (REVIEWS, {}, {}),
    "own label": (REVIEWS, {"template": "{text}\n\nThis review is", "completion": " {label}"}, {}),
    "label after lines": (REVIEWS, {"template": "Review: {text}\n\n"}, {}),
    "label, nothing after": (REVIEWS, {"template": "{text}"}, {}),
    "plain prompt": (ASKS, {}, {}),
    "prompt with spaces after": (ASKS, {"template": "Q: {prompt} \nA: "}, {}),
    "prompt with a history": (EARLIER, {}, {}),
    "alpaca prompt with a history": (EARLIER, {"template": "alpaca"}, {}),
    "alpaca": (ALPACA, {}, {}),
    "plain alpaca": (ALPACA, {"template": "plain"}, {}),
    "alpaca with a system text": (LEADING, {}, {}),
    "several columns": (CONTEXT, {"template": 'About {about} "{{x}}"\n{q}\nA:'}, {"columns": {"prompt": "prompt"}}),
    "a column that is always the same": (SAME, {"template": "{about}: {prompt}\nA:"}, {}),
    "chat": (TALK, {}, {}),
    "chat with its system": (SYSTEM, {}, {}),
    "chat with the recipe's system": (TALK, {"system": 'Say "yes" {now}.'}, {}),
    "both": (SYSTEM + TALK, {"system": "Only where there is none."}, {}),
    "plain chat": (TALK, {"template": "plain", "system": "Hm."}, {}),
    "labels as chat": (REVIEWS, {"template": "chat", "system": "good or bad?"}, {}),
    "alpaca as chat": (ALPACA, {"template": "chat"}, {}),
}


def own(family: str) -> Tokenizer:
    return copy.deepcopy(tokenizer_of(family))


def prepared(folder: Path, rows: list[dict[str, Any]], prompt: dict[str, Any], tokenizer: Tokenizer) -> Prepared:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {"model": {"path": "m"}, "data": {"train": "rows.jsonl", "valid": "rows.jsonl"}, "prompt": prompt}
    )
    return result_of(prepare(recipe, tokenizer, base=folder, clock=CLOCK))


def travelling(
    found: Prepared, tokenizer: Tokenizer, always: dict[str, str | None] | None = None
) -> tuple[str, list[str]]:
    """The template, and what is said of it."""
    return Prompts(found, always or {}).template(tokenizer, "runs/a #} run")


def written(template: str, tokenizer: Tokenizer, messages: Any, tools: Any = None) -> list[int]:
    text = render(tokenizer, Conversation(messages, [(len(messages), True)], tools or None), template=template)[0]
    return next(encode(tokenizer, [text])).tokens


@pytest.mark.parametrize("family", ["qwen 2", "zephyr", "llama 3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_asked_as_it_was_trained(tmp_path: Path, kind: str, family: str) -> None:
    rows, prompt, _ = KINDS[kind]
    tokenizer = own(family)
    found = prepared(tmp_path, rows, prompt, tokenizer)
    always = {"about": "Rome"} if "always" in kind else {}
    template, _ = travelling(found, tokenizer, always)
    asked = list(Prompts(found, always).rows(found.train.records))
    assert len(asked) == len(rows)
    for location, messages, tools, text in asked:
        assert written(template, tokenizer, messages, tools) == encode_prompt(tokenizer, text), location
    starts = [example.prompt_tokens.tolist() for example in found.train.examples]
    assert [encode_prompt(tokenizer, text) for *_, text in asked] == starts


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_written_as_the_run_asks_them(tmp_path: Path, family: str) -> None:
    tokenizer = own(family)
    system = "Be kind." if FAMILIES[family].system else None
    found = prepared(tmp_path, TALK, {"system": system} if system else {}, tokenizer)
    template, _ = travelling(found, tokenizer)
    for probe in PROBES:
        if probe[0]["role"] == "system" and not FAMILIES[family].system:
            continue
        text = Prompts(found, {}).asked(probe)
        assert written(template, tokenizer, probe) == encode_prompt(tokenizer, text), probe


@pytest.mark.parametrize("kind", ["plain prompt", "alpaca", "own label"])
def test_questions_are_written_as_the_run_asks_them(tmp_path: Path, kind: str) -> None:
    rows, prompt, _ = KINDS[kind]
    tokenizer = own("zephyr")
    found = prepared(tmp_path, rows, prompt, tokenizer)
    template, _ = travelling(found, tokenizer)
    for probe in PROBES:
        text = Prompts(found, {}).asked(probe)
        assert written(template, tokenizer, probe) == encode_prompt(tokenizer, text), probe


SHARED = [row | {"system": "Be brief."} for row in ASKS]


@pytest.mark.parametrize("family", ["qwen 2", "zephyr", "llama 3"])
@pytest.mark.parametrize(
    ("rows", "prompt", "system"),
    [
        (SYSTEM, {}, "Be kind."),
        (SYSTEM, {"system": "Only where there is none."}, "Be kind."),
        (SYSTEM, {"template": "plain"}, "Be kind."),
        (LEADING, {}, "Sums."),
        (LEADING, {"template": "chat"}, "Sums."),
        (SHARED, {}, "Be brief."),
    ],
)
def test_a_system_text_of_all_training_rows_stands_where_a_question_has_none(
    rows: list[dict[str, Any]], prompt: dict[str, Any], system: str, family: str, tmp_path: Path
) -> None:
    """As `generate` and `chat` ask; another system text takes its place."""
    tokenizer = own(family)
    found = prepared(tmp_path, rows, prompt, tokenizer)
    always = always_filled(found.renderer, found.format, found.train.records)
    assert always["system"] == system
    template, notes = travelling(found, tokenizer, always)
    assert not any("system" in note for note in notes)
    for given in (system, "Another."):
        wanted = Prompts(found, {}).asked([{"role": "system", "content": given}, *PROBES[0]])
        asked = PROBES[0] if given == system else [{"role": "system", "content": given}, *PROBES[0]]
        assert Prompts(found, always).asked(asked) == wanted
        assert written(template, tokenizer, asked) == encode_prompt(tokenizer, wanted)
    for location, messages, tools, text in Prompts(found, always).rows(found.train.records):
        assert written(template, tokenizer, messages, tools) == encode_prompt(tokenizer, text), location


def test_what_every_training_row_had_and_no_template_can_give_is_said(tmp_path: Path) -> None:
    tokenizer, tools = own("qwen 2"), [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [
        {"messages": [{"role": "system", "content": f"{i}"}, *row["messages"]], "tools": tools}
        for i, row in enumerate(TALK)
    ]
    found = prepared(tmp_path, rows, {}, tokenizer)
    always = always_filled(found.renderer, found.format, found.train.records)
    said = [f"every training row had {name}: give the same with each question" for name in ("a system text", "tools")]
    assert travelling(found, tokenizer, always)[1] == said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("On {{ date_string }}. ", "On 09 Mar 2026. "),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y/%m/%d') }}{% endif %} ", "2026/03/09 "),
        ("{% set d = strftime_now( \"%d %B\" ) %}{{ d }} ", "09 March "),
        ("  {% if not current_date is defined %}{% endif %}{{ current_date }} ", "2026-03-09 "),
    ],
)  # fmt: skip
def test_the_date_of_the_run_travels(tmp_path: Path, template: str, says: str) -> None:
    tokenizer = own("qwen 2")
    tokenizer.chat_template = template + tokenizer.chat_template
    found = prepared(tmp_path, TALK, {}, tokenizer)
    travels, notes = travelling(found, tokenizer)
    assert not notes
    tokens = written(travels, tokenizer, PROBES[0])
    assert tokenizer.decode(tokens).startswith(says)
    assert tokens == encode_prompt(tokenizer, Prompts(found, {}).asked(PROBES[0]))


def test_a_date_that_cannot_be_fixed_is_said(tmp_path: Path) -> None:
    tokenizer = own("qwen 2")
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}" + tokenizer.chat_template
    found = prepared(tmp_path, TALK, {}, tokenizer)
    assert travelling(found, tokenizer)[1] == ["the chat template writes the date of the day on which it is used"]


def test_what_cannot_travel_is_said(tmp_path: Path) -> None:
    tokenizer = own("qwen 2")
    found = prepared(tmp_path, CONTEXT, KINDS["several columns"][1], tokenizer)
    columns, single = travelling(found, tokenizer)[1]
    assert columns == 'a message holds all of the prompt\'s columns, written as "{about} \\"{x}\\"\\n{q}"'
    assert "the last one is written" in single


def test_the_comment_is_too_long_to_be_taken_for_a_known_template(tmp_path: Path) -> None:
    tokenizer = own("qwen 2")
    template = travelling(prepared(tmp_path, TALK, {}, tokenizer), tokenizer)[0]
    assert template.index("#}") > 100 and "runs/a  run" in template


def test_an_answer_in_a_travelling_prompt_ends_with_the_end_token(tmp_path: Path) -> None:
    tokenizer = own("zephyr")
    found = prepared(tmp_path, *KINDS["own label"][:2], tokenizer)
    tokenizer.chat_template = travelling(found, tokenizer)[0]
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
