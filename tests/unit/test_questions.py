"""What is asked beside the held-out rows: the same questions in other words, with words swapped, and of which group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.check.run_analysis import questions_of
from finetune.evaluation.analysis import rows_again
from finetune.recipe.load import check_recipe
from finetune.training.job import Job
from tests.unit.toy_run import load_job

pytest.importorskip("transformers")


def job(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Job:
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")} | sections.pop("data", {})
    values = {"model": {"path": "builtin:reviews-base"}, "data": data, "backend": "reference", **sections}
    return load_job(check_recipe(values))


def test_rows_with_a_word_of_the_list_are_asked_with_the_other(tmp_path: Path) -> None:
    texts = ["She is a fine actress", "A dull film", "it bored her", "a warm one"]
    rows = [{"text": f"{text} {i}", "label": ("bad", "good")[i % 2]} for i, text in enumerate(texts * 5)]
    asked = questions_of(job(tmp_path, rows, evaluate={"swaps": "pronouns"})).swapped
    assert asked.rows == tuple(i for i in range(20) if i % 2 == 0 and i % 4 != 1)
    assert "He is a fine actor 0" in asked.examples[0].prompt and "it bored his 2" in asked.examples[1].prompt
    assert [example.answer for example in asked.examples[:2]] == ["bad", "bad"]
    assert questions_of(job(tmp_path, rows)).swapped.rows == ()


def test_an_instruction_is_put_in_other_words_and_its_input_is_not(tmp_path: Path) -> None:
    rows = [{"instruction": "What's this?", "input": f"it's {i}.", "output": f"It is {i}"} for i in range(40)]
    made = job(tmp_path, rows, train={"epochs": 150}, evaluate={"max_tokens": 8})
    asked = questions_of(made).in_other_words
    assert len(asked.rows) == rows_again(made.recipe, made.prepared) == 32
    assert all("What is this?" in one.prompt and "it's " in one.prompt for one in asked.examples)
    assert all(f"it's {row}." in one.prompt for row, one in zip(asked.rows, asked.examples, strict=True))


def test_of_a_conversation_the_last_question_is_put_in_other_words(tmp_path: Path) -> None:
    roles = ("user", "assistant") * 2
    rows = []
    for i in range(40):
        turns = ("What's first?", "It is one", f"What's next to {i}?", f"It is {i}")
        rows.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]})
    asked = questions_of(job(tmp_path, rows, train={"epochs": 150}, evaluate={"max_tokens": 8})).in_other_words
    assert len(asked.rows) == 32
    for row, example in zip(asked.rows, asked.examples, strict=True):
        assert "What's first?" in example.prompt and f"What is next to {row}?" in example.prompt


def test_groups_are_of_a_column_or_of_words(tmp_path: Path) -> None:
    rows = [
        {"text": f"she wrote {i}" if i % 3 else f"he wrote {i}", "label": "ab"[i % 2], "who": "xy"[i % 2]}
        for i in range(12)
    ]
    by_column = questions_of(job(tmp_path, rows, data={"groups": "who"})).groups
    by_words = questions_of(
        job(tmp_path, rows, data={"groups": {"women": ["she"], "men": ["he"], "none": ["xyz"]}})
    ).groups
    assert by_column == {"x": [0, 2, 4, 6, 8, 10], "y": [1, 3, 5, 7, 9, 11]}
    assert by_words == {"men": [0, 3, 6, 9], "women": [i for i in range(12) if i % 3]}
    assert questions_of(job(tmp_path, rows)).groups == {}
