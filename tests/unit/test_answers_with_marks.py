"""Special tokens inside an answer are part of it: in both sides of exact match, on the screen and in the next turn."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import Batch, Scores
from finetune.data.prepare import prepare
from finetune.data.renderers import question_tokens
from finetune.data.rows import Prepared
from finetune.data.tokenizer import answer_text, stop_tokens
from finetune.evaluation.evaluate import Evaluation, evaluate_held_out
from finetune.recipe.schema import Recipe
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of

MARKS = ["[CALL]", "<|channel|>", "<|message|>", "<|python_tag|>", "<|tool|>"]
CALLS = (
    "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else "
    "('[CALL]' + (m.tool_calls | tojson) if m.tool_calls else m.content) + eos_token }}{% endfor %}"
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if '<|channel|>' in m.content %}"
    "{{ raise_exception('no channels in content') }}{% endif %}"
    "{{ '<|im_start|>assistant<|channel|>final<|message|>' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def marked(template: str | None = None) -> Any:
    tokenizer = copy.deepcopy(byte_level(template))
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


def talk(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "where?"}, {"role": "assistant", "content": answer, **more}]}


CALL = {"type": "function", "function": {"name": "track", "arguments": {"id": "A1"}}}
KINDS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], str]] = {
    "call": (CALLS, talk("", tool_calls=[CALL]), {}, "[CALL][{"),
    "channel": (CHANNELS, talk("At the hub."), {}, "<|channel|>final<|message|>At the hub."),
    "in the row": (None, {"prompt": "run", "completion": "<|python_tag|>1 + 1"}, {}, "<|python_tag|>1 + 1"),
    "in the middle": (CHATML, talk("I look. <|tool|>find"), {}, "I look. <|tool|>find"),
    "a form": (None, {"prompt": "run", "completion": "good"}, {"completion": " [CALL]{completion}."}, "[CALL]good."),
    "no mark": (CHATML, talk("a fine film"), {}, "a fine film"),
}


class Writes:
    """A model that writes what `answers` says, and is sure of nothing."""

    shares_prefixes = False

    def __init__(self, prepared: Prepared, wrong: Sequence[int] = ()) -> None:
        rows = prepared.held_out.examples
        self.answers = {tuple(e.prompt_tokens.tolist()): [*e.answer_tokens.tolist(), *wrong] for e in rows}

    def score(self, batch: Batch) -> Scores:
        shape = batch.inputs.shape
        return Scores(np.full(shape, -1.0, np.float32), np.zeros(shape, np.int32))

    def generate(self, prompts: Sequence[Sequence[int]], *rest: Any) -> list[list[int]]:
        return [self.answers[tuple(prompt)] for prompt in prompts]


def measured(folder: Path, kind: str, wrong: Sequence[int] = ()) -> Evaluation:
    template, row, prompt, _ = KINDS[kind]
    tokenizer = marked(template)
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = {"train": "rows.jsonl", "valid": "rows.jsonl"}
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": data, "prompt": prompt})
    prepared = result_of(prepare(recipe, tokenizer, base=folder))
    session: Any = Writes(prepared, wrong)
    return result_of(evaluate_held_out(session, recipe, prepared, tokenizer, "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_are_an_exact_match_and_keep_their_marks(tmp_path: Path, kind: str) -> None:
    found = measured(tmp_path, kind)
    assert found.accuracy == 1.0
    predicted = found.results[0].predicted
    assert predicted is not None and predicted.startswith(KINDS[kind][3])
    if kind != "a form":  # there the row's own words are expected, in that form
        assert predicted == found.results[0].expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_mark_more_is_another_answer(tmp_path: Path, kind: str) -> None:
    extra = marked().convert_tokens_to_ids("<|tool|>")
    assert measured(tmp_path, kind, [extra]).accuracy == 0.0


def test_only_what_ends_an_answer_is_taken_off() -> None:
    tokenizer = marked(CHATML)
    stop = stop_tokens(tokenizer)
    for text in ("[CALL]{}", "<|channel|>final<|message|> a  b", "plain", "a , b 's"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer_text(tokenizer, tokens, stop) == text
        padding = [tokenizer.pad_token_id] * 2
        assert answer_text(tokenizer, [*tokens, *sorted(stop), *padding], stop) == text


def asked(template: str, answer: str) -> str:
    tokenizer = marked(template)
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "t.jsonl", "format": "chat"}})
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "sure?"},
    ]
    return str(tokenizer.decode(question_tokens(recipe, tokenizer, messages)))


def test_the_next_turn_is_asked_after_what_the_model_really_said() -> None:
    """Also where the template would refuse the marks, or write them a second time."""
    said = "<|channel|>final<|message|>At the hub."
    first = "<|im_start|>user<|message|>where?<|im_end|><|im_start|>assistant"
    second = "<|im_end|><|im_start|>user<|message|>sure?<|im_end|><|im_start|>assistant"
    assert asked(CHANNELS, said) == first + said + second
    assert asked(CALLS, "[CALL][]").endswith("[INST]where?[/INST][CALL][]</s>[INST]sure?[/INST]")
    assert asked(CHANNELS, "At the hub.") == first + "<|channel|>final<|message|>At the hub." + second
    assert "I look. <|tool|>find<|im_end|>\n" in asked(CHATML, "I look. <|tool|>find")
