"""Plain text in windows, losses in tokens, and conversations that are longer than any template was made for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizers import CHATML, QWEN3, byte_level

from finetune.check.tokens import TokenChecker
from finetune.data import conversation, template_sandbox
from finetune.data.chat_template import ChatRenderer
from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Prepared, Record
from finetune.errors import DataError, EnvironmentProblem, RecipeError
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of

BOOK = " ".join(f"film {n} was good" for n in range(60))


def told(folder: Path, rows: list[Any], tokenizer: Any, **sections: Any) -> Prepared:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "rows.jsonl", "valid": "rows.jsonl"} | sections.pop("data", {})
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": data, **sections})
    found = result_of(prepare(recipe, tokenizer, base=folder))
    refuse(found, recipe)
    return found


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [8, 16, 33, 100])
def test_windows_teach_each_token_once(tmp_path: Path, max_length: int, bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    split = {"data": {"long_rows": "split"}, "train": {"max_length": max_length}}
    found = told(tmp_path, [{"text": BOOK}, {"text": "ok"}], tokenizer, **split)
    (whole, _) = told(tmp_path, [{"text": BOOK}, {"text": "ok"}], tokenizer, train={"max_length": 5000}).train.examples
    *parts, short = found.train.examples
    assert short.tokens.tolist()[-1] == tokenizer.eos_token_id and all(len(part) <= max_length for part in parts)
    learned = np.concatenate([part.tokens[part.weights > 0] for part in parts])
    assert learned.tolist() == whole.tokens[whole.weights > 0].tolist()
    assert all(part.tokens[0] == tokenizer.bos_token_id and part.weights[0] == 0 for part in parts if bos)
    shared = max_length // 8
    for before, after in pairwise(parts):
        head = int(bos)
        assert after.tokens[head : head + shared].tolist() == before.tokens[len(before) - shared :].tolist()
    assert [part.piece for part in parts] == [True] * (len(parts) - 1) + [False] and found.train.lost_tokens == 0
    assert any(
        f"1 rows of text split into {len(parts)} of at most {max_length} tokens" in one for one in found.train.notes
    )
    checker = TokenChecker(tokenizer, frozenset({tokenizer.eos_token_id}), True)
    checker.look(found.train.examples)
    assert checker.result.total == 0


def test_only_plain_text_can_be_split(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.long_rows: only plain text can be split, and the rows are prompt"):
        told(tmp_path, [{"prompt": "a", "completion": "b"}], byte_level(), data={"long_rows": "split"})


def test_tokens_that_are_lost_are_said_and_stop_plain_text(tmp_path: Path) -> None:
    rows = [{"text": BOOK}, *({"text": f"film {n}"} for n in range(200))]
    with pytest.raises(
        DataError, match=r"% of its tokens would be left out.*set data.long_rows: split, raise"
    ) as caught:
        told(tmp_path, rows, byte_level(), train={"max_length": 20})
    share = str(caught.value).rsplit(" ", 1)[1]
    found = told(tmp_path, rows, byte_level(), train={"max_length": 20}, data={"max_dropped": float(share)})
    total = sum(found.train.lengths)
    assert found.train.lost_tokens == total - sum(map(len, found.train.examples))
    assert found.train.lost_supervised == found.train.lost_tokens  # no begin token, and nothing but text
    assert f"{found.train.lost_tokens / total:.1%} of all tokens ({found.train.lost_tokens:,})" in found.train.notes[-1]
    assert found.train.account["lost_tokens"] == found.train.lost_tokens
    answers = told(tmp_path, [{"prompt": BOOK, "completion": "b"}], byte_level(), train={"max_length": 20})
    assert (
        answers.train.lost_tokens > 100 and answers.train.lost_supervised == 0
    )  # a prompt that gives way stops no run


def talk(exchanges: int) -> list[dict[str, str]]:
    names = ("user", "assistant")
    return [{"role": names[n % 2], "content": f"step {n}: {'a warm film ' * 4}"} for n in range(2 * exchanges)]


def test_a_long_honest_conversation_is_written_turn_by_turn() -> None:
    tokenizer = byte_level(CHATML)
    rendered = ChatRenderer("chat", tokenizer).render(Record("f:1", messages=tuple(talk(200))))[0]
    turns = [rendered.text[start:end] for start, end in rendered.supervised]
    assert turns == [f"{one['content']}<|im_end|>" for one in talk(200)[1::2]]


@pytest.mark.slow
def test_a_conversation_beyond_the_bound_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": talk(25_000)}, *({"messages": talk(1)} for _ in range(2))]
    with pytest.raises(DataError, match=r"^rows.jsonl:1: .*its 50,000 messages are too many.*split them"):
        told(tmp_path, rows, byte_level(CHATML))
    skips = {"on_error": "skip", "max_dropped": 0.5}
    assert len(told(tmp_path, rows, byte_level(CHATML), data=skips).train.examples) == 2
    monkeypatch.setattr(conversation, "FOR_MESSAGE", 1e-9)
    monkeypatch.setattr(conversation, "FOR_CHARACTER", 1e-12)
    with pytest.raises(DataError, match=r"^rows.jsonl:2: .*ran for more than 0.5 s.*its 1,200 messages are too many"):
        told(tmp_path, [rows[1], {"messages": talk(600)}], byte_level(CHATML))


@pytest.mark.slow
def test_a_template_that_loops_on_two_messages_is_refused_whatever_the_row() -> None:
    ever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for turns in (talk(1), talk(10)):
        with pytest.raises(EnvironmentProblem, match="ran for more than"):
            ChatRenderer("chat", byte_level(ever)).render(Record("f:1", messages=tuple(turns)))


def test_a_template_that_loops_on_long_conversations_alone_spares_the_other_rows(tmp_path: Path) -> None:
    wild = (
        "{% if messages | length > 9 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"^rows.jsonl:2: .*ran for more than .* messages are too many"):
        told(tmp_path, [{"messages": talk(n)} for n in (1, 8, 2)], byte_level(wild + "{% endif %}" + CHATML))


def test_the_texts_of_a_template_that_rewrites_are_told_by_what_they_share() -> None:
    rows = ChatRenderer("chat", byte_level(QWEN3)).render(Record("f:1", messages=tuple(talk(5))))
    assert [row.text.count("<think>") for row in rows] == [1] * 5
    prefixes = [(1, True), (2, False), (3, True), (4, False)]
    grows = "{% if messages | length < 4 %}{{ messages | length }}{% endif %}"
    for template in (QWEN3, CHATML, "{{ messages | length }}{{ messages[-1].content }}", grows):
        tokenizer = byte_level(template)
        expected = [
            template_sandbox.render(tokenizer, conversation.Conversation(talk(2), [one]))[0] for one in prefixes
        ]
        assert template_sandbox.render(tokenizer, conversation.Conversation(talk(2), prefixes)) == expected
