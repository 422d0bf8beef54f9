"""The part of an open answer that `evaluate.answer` compares, in both answers, in the report and in the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune.data.rows import Example, Prepared, Split
from finetune.evaluation import evaluate as module
from finetune.evaluation.answers import part_of
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.scoring import RowLosses, Written
from finetune.recipe.schema import AnswerPart
from finetune.report.report import compare
from finetune.report.tables import comparison_table
from tests.unit.toy_run import result_of


@pytest.mark.parametrize(
    ("compared", "same", "other"),
    [
        ("all", [" a\nb ", "a\nb"], ["a", "A\nb", ""]),
        ("first_line", ["yes", " yes \nbecause", "\n\nyes\r\nno"], ["no\nyes", "yes.", "YES"]),
        (
            "last_number",
            ["1000", "12 and 1,000", "so it is $1,000.00.", "= 1e3", "+1000", "1000 %"],
            ["1000 or 2", "-1000", "1,000,5", "1 000"],
        ),
        ("last_number", ["-2.5", "from 1 to \u22122.50", "x = -2.5!"], ["2.5", "1-2.5", "-2.51"]),
        ("last_number", ["0", "-0.0", "zero is 0.00"], ["10", "0.01"]),
        (
            "json",
            ['{"a": [1, true], "b": null}', '{"b":null,\n"a":[1.0,true]}', '```json\n{"b":null,"a":[1,true]}\n```'],
            [
                '{"a": [true, 1], "b": null}',
                '{"a": [1, 1], "b": null}',
                '{"a": [1, true]}',
                '{"a": ["1", true], "b": null}',
            ],
        ),
        ("json", ['"x"', ' "\\u0078" '], ['"y"', "null", '["x"]']),
    ],
)
def test_equal_values_have_equal_parts(compared: AnswerPart, same: list[str], other: list[str]) -> None:
    parts = {part_of(text, compared) for text in same}
    assert len(parts) == 1 and None not in parts
    assert not parts & {part_of(text, compared) for text in other}


@pytest.mark.parametrize(
    ("compared", "text"),
    [
        ("first_line", ""), ("first_line", " \n "),
        ("last_number", ""), ("last_number", "none, or seven"), ("last_number", "-."),
        ("json", ""), ("json", "yes"), ("json", '{"a": 1'), ("json", "NaN"), ("json", "[" * 100_000),
        ("json", '{"a": 1} and more'), ("json", "1" * 5000),
    ],
)  # fmt: skip
def test_where_there_is_none_it_says_so(compared: AnswerPart, text: str) -> None:
    assert part_of(text, compared) is None


@pytest.mark.parametrize("text", ["9" * 100_000, "1e999", "1.5e-999", "0." + "1" * 100_000, "1," * 50_000])
def test_numbers_beyond_measure_are_read_at_once(text: str) -> None:
    assert part_of(text, "last_number") is not None


def evaluated(monkeypatch: pytest.MonkeyPatch, answers: Sequence[tuple[str, str]], compared: AnswerPart) -> Evaluation:
    """(expected, written) of each row."""
    n = len(answers)
    examples = tuple(
        Example(np.array([1, 2], np.int32), np.array([0, 1], np.float32), f"a:{i}", truth, "?", cut=True)
        for i, (truth, _) in enumerate(answers)
    )

    def losses(*_: Any) -> Any:
        yield from ()
        return RowLosses(np.ones(n), np.ones(n, np.int64), np.ones(n, np.int64), np.ones(n, np.int64))

    def written(*_: Any) -> Any:
        yield from ()
        return [Written(answer, True) for _, answer in answers]

    monkeypatch.setattr(module, "row_losses", losses)
    monkeypatch.setattr(module, "write_answers", written)
    split = Split("valid", n, examples=examples)
    prepared = Prepared("generation", "prompt", "plain", Split("train", 0), split)
    work = evaluate(
        None,  # type: ignore[arg-type]
        prepared,
        split,
        name="x",
        micro_tokens=1,
        max_tokens=1,
        decode=lambda tokens: "",
        compared=compared,
    )
    return result_of(work)


ANSWERS = [("It is 5.", "5"), ("It is 7.0", "I say 7"), ("nothing", "7"), ("8", "none"), ("9", "10")]


def test_rows_are_right_by_that_part_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(monkeypatch, ANSWERS, "last_number")
    assert [row.correct for row in found.results] == [True, True, False, False, False]
    assert (found.accuracy, found.compared, found.unread) == (0.4, "last_number", (1, 1))
    assert found.results[1].compared == ("7", "7")
    assert (found.results[1].expected, found.results[1].predicted) == ("It is 7.0", "I say 7")
    whole = evaluated(monkeypatch, ANSWERS, "all")
    assert (whole.accuracy, whole.unread, whole.results[0].compared) == (0.0, (0, 0), None)


def test_two_answers_without_it_are_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(monkeypatch, [("none", "none"), ("a", "b")], "json")
    assert (found.accuracy, found.unread) == (0.0, (2, 2))


def test_the_report_names_what_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = evaluated(monkeypatch, ANSWERS * 4, "last_number")
    base = evaluated(monkeypatch, [(truth, "?") for truth, _ in ANSWERS * 4], "last_number")
    verdict = compare(base, tuned).verdict
    assert verdict.startswith("Better: same last number 0.000")
    assert "count as wrong: 4 expected, 20 before, 4 after." in verdict
    rows = list(comparison_table(base.summary(), tuned.summary()).columns[0].cells)
    assert rows[0] == "same last number"
    assert json.loads(json.dumps(tuned.to_json()))["results"][0]["compared"] == ["5", "5"]


def test_a_share_of_0_before_and_after_leans_on_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    base = evaluated(monkeypatch, [("1", "x"), ("2", "y")], "last_number")
    verdict = compare(base, replace(base, loss=0.5)).verdict
    assert "loss" in verdict and "same last number is 0 before and after" in verdict
