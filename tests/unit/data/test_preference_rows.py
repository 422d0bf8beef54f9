"""Pairs of answers in the forms in which people keep them: one prompt and two answers; and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.formats import recognise
from finetune.data.pair_batches import as_one, pair_batches
from finetune.data.preference_rows import compared, pair_notes
from finetune.data.prepare import prepare
from finetune.data.problems import BadSource
from finetune.data.records import read_records
from finetune.data.rows import Example, Record, Row, Rows
from finetune.events import result_of
from finetune.recipe.load import check_recipe
from tests.unit.data.toy_tokenizers import CHATML, byte_level

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
EARLIER = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "so"}]
PLAIN = ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "b"})
TALK = ({"messages": [USER, GOOD]}, {"messages": [USER, BAD]})
LONG = ({"messages": [*EARLIER, USER, GOOD]}, {"messages": [*EARLIER, USER, BAD]})


def records(*fields: dict[str, Any]) -> list[Record]:
    read = compared(rows(*fields), {}).rows
    return read_records(read, recognise(read, "auto", {}))[0]


def rows(*fields: dict[str, Any]) -> Rows:
    return Rows([Row(one, "f.jsonl", number) for number, one in enumerate(fields, 1)], [])


@pytest.mark.parametrize(
    ("row", "sides"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PLAIN),
        ({"question": "q", "response_chosen": "a", "response_rejected": "b"}, PLAIN),
        ({"instruction": "q", "Chosen": "a", "Rejected": "b"}, PLAIN),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, TALK),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 1.0}, TALK),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, TALK),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, TALK),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, TALK),
        ({"prompt": [*EARLIER, USER], "chosen": [GOOD], "rejected": [BAD]}, LONG),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            TALK,
        ),
        (
            {side: f"\n\nHuman: before\n\nAssistant: so\n\nHuman: q\n\nAssistant: {text}"
             for side, text in (("chosen", "a"), ("rejected", "b"))},
            LONG,
        ),
    ],
)  # fmt: skip
def test_every_form_is_one_prompt_and_two_answers(row: dict[str, Any], sides: tuple[Any, Any]) -> None:
    read = compared(rows(row, row), {})
    assert not read.bad
    for one in read.rows:
        assert one.rejected is not None
        for found, expected in zip((one.fields, one.rejected), sides, strict=True):
            assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is missing"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "both"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "differ before"),
    ],
)
def test_a_bad_pair_is_named_with_its_line(row: dict[str, Any], why: str) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    read = compared(rows(good, row), {})
    assert [place for place, _ in read.bad] == ["f.jsonl:2"] and why in read.bad[0][1] and len(read.rows) == 1


def test_columns_may_be_named_and_must_be_there() -> None:
    row = {"ask": "q", "best": "a", "worst": "b"}
    read = compared(rows(row, row), {"prompt": "ask", "chosen": "best", "rejected": "worst"})
    assert (read.rows[0].fields, read.rows[0].rejected) == PLAIN
    with pytest.raises(BadSource, match="chosen and rejected"):
        compared(rows(row), {})


def test_length_and_contradictions_are_said() -> None:
    pairs = [{"prompt": f"q{i}", "chosen": "a long answer", "rejected": "short"} for i in range(60)]
    pairs.append({"prompt": "q7", "chosen": "short", "rejected": "a long answer"})
    notes = pair_notes(records(*pairs))
    assert "60 of 61 pairs" in notes[0] and "length alone" in notes[0]
    assert notes[1] == "2 pairs say the opposite of another one: f.jsonl:8, f.jsonl:61"
    fair = [{"prompt": f"q{i}", "chosen": "ab"[: 1 + i % 2], "rejected": "cd"[: 2 - i % 2]} for i in range(60)]
    told = pair_notes(records(*fair))
    assert len(told) == 1 and "length alone" not in told[0]


@pytest.mark.parametrize("other", [{"prompt": [USER, GOOD, USER]}, {"prompt": [{**USER, "content": "p"}]}])
def test_conversations_are_opposite_only_where_all_before_them_is_the_same(other: dict[str, Any]) -> None:
    there, back = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {"chosen": [BAD], "rejected": [GOOD]}
    assert len(pair_notes(records(there, {**back, **other}))) == 1
    assert "f.jsonl:1, f.jsonl:2" in pair_notes(records(there, {**back, "prompt": [USER]}))[1]


@pytest.mark.parametrize("keys", [{}, {"limit": 10}, {"valid": "rows.jsonl"}], ids=str)
def test_the_pairs_of_each_split_are_counted_apart(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Those that are trained on alone say what a model may learn from them."""
    pairs = [{"prompt": f"q{i}", "chosen": "long" if i % 3 else "s", "rejected": "two"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in pairs))
    written = {
        "model": {"path": "builtin:reviews-base"}, "data": {"train": "rows.jsonl", **keys}, "preferences": {},
        "prompt": {"template": "plain"},
    }  # fmt: skip
    made = result_of(prepare(check_recipe(written), byte_level(CHATML), tmp_path))
    for split in (made.train, made.valid):
        said = [note for note in split.notes if "longer answer" in note]
        longer = sum(len(one.answer or "") > len(one.rejected.answer or "") for one in split.examples if one.rejected)
        assert len(said) == 1 and f" in {longer} of {len(split.examples)} pairs" in said[0]


def pair(prompt: int, better: int, worse: int, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    asked = rng.integers(1, 100, prompt)

    def answered(count: int) -> Example:
        tokens = np.array([*asked, *rng.integers(1, 100, count)], np.int32)
        return Example(tokens, (np.arange(len(tokens)) >= prompt).astype(np.float32), "f:1", answer_start=prompt)

    example = answered(better)
    return Example(example.tokens, example.weights, "f:1", answer_start=prompt, rejected=answered(worse))


SIZES = [(40, 5, 9), (50, 3, 2), (10, 7, 7), (90, 1, 4), (3, 2, 30)]  # prompt, better, worse


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 150, 4096])
def test_every_pair_stands_once_with_both_answers_beside_each_other(share: bool, micro_tokens: int) -> None:
    pairs = [
        pair(*sizes, seed=i) for i, sizes in enumerate([(40, 5, 9), (50, 3, 2), (10, 7, 7), (90, 1, 4), (3, 2, 30)])
    ]
    made = pair_batches(pairs, micro_tokens, share)
    assert sorted(number for numbers, _ in made for number in numbers) == [0, 1, 2, 3, 4]
    for numbers, batch in made:
        assert batch.rows == tuple(row for number in numbers for row in (2 * number, 2 * number + 1))
        assert len(numbers) == 1 or micro_tokens > 1
        for place, number in enumerate(numbers):
            both = pairs[number], pairs[number].rejected
            for side, one in enumerate(both):
                assert one is not None
                row = 2 * place + side
                before = batch.prefixes[batch.prefix_of[row]] if batch.prefixes else np.zeros(0, np.int32)
                count = len(one) - len(before) - 1
                assert [*before, *batch.inputs[row, :count]] == one.tokens[:-1].tolist()
                supervised = batch.targets[row][batch.weights[row] > 0]
                assert supervised.tolist() == one.tokens[one.weights > 0].tolist()
            assert bool(batch.prefixes) == (share and len(pairs[number].prompt_tokens) > 32)


@pytest.mark.parametrize("sides", [(5, 9), (9, 5), (7, 7), (1, 60)])
def test_a_pair_counts_its_prompt_once_and_both_answers_as_wide_as_the_longer(sides: tuple[int, int]) -> None:
    whole = as_one(pair(40, *sides))
    assert len(whole) == len(whole.weights) == 40 + 2 * max(sides)
    assert whole.weights.sum() == sum(sides) and whole.rejected is None
