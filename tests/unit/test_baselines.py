"""A gain over the base model is called better only where a model that knows nothing would not do as well."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from finetune.console import plain_page
from finetune.data.rows import Example, Prepared, Split
from finetune.errors import Incompatible
from finetune.evaluation.baselines import MOST_ROWS, Words, bag_of_words, majority, never_predicted
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import (
    confusion_matrix,
    macro_f1,
    macro_f1_change,
    macro_f1_interval,
    mcnemar_exact,
    wilson_interval,
)
from finetune.evaluation.naive_bayes import MOST_READ
from finetune.evaluation.verdict import comparison_verdict
from finetune.report.tables import comparison_table


def evaluation(expected: str, predicted: str, labels: str = "abc") -> Evaluation:
    """One letter a row. labels: empty for open answers."""
    rows = tuple(
        RowResult(f"t.jsonl:{i + 1}", "", true, answer, true == answer, 1.0, 1)
        for i, (true, answer) in enumerate(zip(expected, predicted, strict=True))
    )
    right = sum(bool(row.correct) for row in rows)
    macro = None
    if labels:
        macro = macro_f1(confusion_matrix([*map(labels.index, expected)], [*map(labels.index, predicted)], len(labels)))
    return Evaluation(
        rows=len(rows),
        tokens=len(rows),
        loss=1.0,
        perplexity=2.7,
        token_accuracy=0.5,
        accuracy=right / len(rows),
        interval=wilson_interval(right, len(rows)),
        macro_f1=macro,
        labels=tuple(labels),
        confusion=None,
        results=rows,
    )


def verdict(expected: str, before: str, after: str, labels: str = "abc", words: float | None = None) -> str:
    base, tuned = evaluation(expected, before, labels), evaluation(expected, after, labels)
    pairs = [(b.correct, t.correct) for b, t in zip(base.results, tuned.results, strict=True)]
    p_value = mcnemar_exact(pairs.count((False, True)), pairs.count((True, False)))
    return comparison_verdict(base, tuned, p_value, None if words is None else Words(words, 100, 0.25, ""))


TRUTH = "a" * 70 + "b" * 20 + "c" * 10


def test_a_real_gain_is_better_and_says_what_knows_nothing_would_have() -> None:
    said = verdict(TRUTH, "b" * 100, TRUTH, words=0.81)
    assert said.startswith("Better: accuracy 0.200")
    assert said.endswith('For comparison: always "a" would have 0.700, chance 0.333, naive Bayes on the words 0.810.')


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("b" * 100, "a" * 100, 'the same answer to all rows: "a"'),
        ("b" * 100, "c" * 45 + TRUTH[45:], "than always answering"),  # 0.55 against 0.70
        ("c" * 100, "b" * 70 + "b" * 20 + "a" * 10, "Never predicted: "),
    ],
)
def test_a_gain_that_a_constant_answer_beats_is_not_called_better(before: str, after: str, words: str) -> None:
    said = verdict(TRUTH, before, after)
    assert "Better" not in said and words in said


def test_the_planted_gains_are_gains_by_mcnemar() -> None:
    assert verdict(TRUTH, "b" * 100, "a" * 100).startswith("Not good yet: accuracy 0.200")
    assert verdict(TRUTH, "b" * 100, "c" * 45 + TRUTH[45:]).startswith("Not good yet: accuracy 0.200")


def test_macro_f1_that_falls_while_accuracy_rises_is_said() -> None:
    truth = "a" * 360 + "b" * 20 + "c" * 20
    before = "b" * 60 + truth[60:]  # every b and c is right
    after = "a" * 360 + "a" * 18 + "bb" + "a" * 16 + "cccc"
    said = verdict(truth, before, after)
    assert said.startswith("Mixed: accuracy 0.850") and "Macro F1 falls from" in said


def test_labels_never_predicted_are_named_and_many_are_counted() -> None:
    assert never_predicted(evaluation("aabc", "aaba")) == ["c"]
    assert never_predicted(evaluation("aabb", "aaba")) == []  # no row is c
    letters = "abcdefghij"
    said = verdict(letters * 9, "a" * 90, "ab" * 45, letters)
    assert 'Never predicted: "c", "d", "e", "f", "g" and 3 more.' in said


def test_open_answers_that_are_all_alike_are_named_too() -> None:
    said = verdict("x" * 60 + "yz" * 20, "q" * 100, "x" * 100, labels="")
    assert said.startswith("Not good yet: exact match 0.000") and 'to all rows: "x"' in said
    assert "For comparison" not in said
    assert "always answering" not in verdict("xyzuvw" + "".join(map(chr, range(200, 210))), "-" * 16, "-" * 16, "")


def test_exact_match_of_nothing_leans_on_the_loss_and_says_so() -> None:
    assert "exact match is 0 before and after" in verdict("xyz" * 9, "qqr" * 9, "qqs" * 9, labels="")


def test_the_most_frequent_answer_is_that_of_the_measured_rows() -> None:
    assert majority(evaluation("aaab", "bbbb")) == ("a", 0.75)


def test_below_the_words_alone_is_said() -> None:
    assert "below naive Bayes on the words" in verdict(TRUTH, "b" * 100, TRUTH[:85] + "a" * 15, words=0.99)
    assert "below naive Bayes" not in verdict(TRUTH, "b" * 100, TRUTH, words=0.99)


def rows(*pairs: tuple[str, str]) -> Split:
    def example(i: int, text: str, label: str) -> Example:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return Example(tokens, np.ones(len(tokens), np.float32), f"x:{i}", label, text)

    return Split("x", len(pairs), tuple(example(i, *pair) for i, pair in enumerate(pairs)))


def prepared(train: Split, valid: Split, labels: tuple[str, ...] = ("good", "bad")) -> Prepared:
    return Prepared("classification", "classification", "plain", train=train, valid=valid, labels=labels)


def test_naive_bayes_learns_words_and_not_the_template() -> None:
    """Five good rows to one bad one, in long and short texts: only the words may decide."""
    good = [(f"Review: a WARM film, number {i} of many more films that I have seen\nLabel:", "good") for i in range(5)]
    train = rows(*good, ("Review: dull\nLabel:", "bad"), ("Review: dull and slow\nLabel:", "bad"))
    asked = rows(
        ("Review: warm\nLabel:", "good"), ("Review: So dull!\nLabel:", "bad"), ("Review: dull\nLabel:", "good")
    )
    assert accuracy(prepared(train, asked)) == pytest.approx(2 / 3)


def test_without_labels_or_training_rows_there_is_no_bag_of_words() -> None:
    some = rows(("a", "good"), ("b", "bad"))
    assert bag_of_words(prepared(some, some, ())) is None
    assert bag_of_words(prepared(rows(), some)) is None
    same = rows(("a", "good"), ("a", "bad"))  # no word tells anything: the more frequent label, or the first
    assert accuracy(prepared(same, same)) == 0.5


def accuracy(found: Prepared) -> float:
    words = bag_of_words(found)
    assert words is not None
    return words.accuracy


def test_the_words_are_measured_once_where_the_rows_are_the_same(tmp_path: Path) -> None:
    train, asked = rows(("warm", "good"), ("dull", "bad")), rows(("so warm", "good"), ("so dull", "bad"))
    file = tmp_path / "words.json"
    first = bag_of_words(prepared(train, asked), file)
    assert first is not None and first.accuracy == 1.0 and first.measured == 2 and first.seconds >= 0
    assert first.cost.startswith("naive Bayes on the words: 2 rows in 0.") and first.cost.endswith("s (words.json)")
    file.write_text(json.dumps(asdict(first) | {"seconds": 123.0}))
    assert bag_of_words(prepared(train, asked), file) == replace(first, seconds=123.0)
    others = [prepared(rows(("dull", "good"), ("warm", "bad")), asked), prepared(train, rows(("so warm", "bad")))]
    assert [found and found.accuracy for found in (bag_of_words(other, file) for other in others)] == [0.0, 0.0]
    file.write_text("{")
    with pytest.raises(Incompatible, match=r"words\.json: not what a run writes"):
        bag_of_words(prepared(train, asked), file)


def test_many_labels_and_long_texts_take_seconds() -> None:
    """Every row has its own label, or a megabyte of words."""
    many = [(f"a {i} b {i + 1}", str(i)) for i in range(20_000)]
    long = [("word " * 200_000 + name, name) for name in ("good", "bad")]
    began = time.process_time()
    found = bag_of_words(prepared(rows(*many), rows(*many[:500]), tuple(label for _, label in many)))
    assert found is not None and found.measured == 500
    bag_of_words(prepared(rows(*long), rows(*long)))
    assert time.process_time() - began < 3.0
    assert MOST_ROWS * MOST_READ <= 5e7, "characters read at most"


def test_the_interval_of_macro_f1_holds_it_and_narrows_with_rows() -> None:
    def width(times: int) -> float:
        truth, predicted = [0, 0, 1, 1, 2, 2, 2] * times, [0, 1, 1, 1, 2, 0, 2] * times
        low, high = macro_f1_interval(truth, predicted, 3)
        assert low < macro_f1(confusion_matrix(truth, predicted, 3)) < high
        assert (low, high) == macro_f1_interval(truth, predicted, 3)
        return high - low

    assert 0.15 * width(4) < width(64) < 0.4 * width(4)
    assert macro_f1_interval([0, 1] * 9, [0, 1] * 9, 2) == (1.0, 1.0)


def test_the_change_of_macro_f1_is_of_pairs() -> None:
    """Two models that are wrong on the same rows but one differ by little, however wide their own intervals are."""
    truth, before = [0, 1] * 20, [0, 1, 1, 0] * 10
    assert macro_f1_change(truth, before, before, 2) == (0.0, 0.0)
    after = [0, 1, 0, 1] * 8 + before[32:]
    low, high = macro_f1_change(truth, before, after, 2)
    assert 0 < low < high


def test_the_table_shows_the_interval_of_macro_f1() -> None:
    summary = evaluation("aabc", "aaba").summary() | {"macro_f1_interval": (0.25, 0.8125)}
    page = plain_page(lambda console: console.print(comparison_table({}, summary)))
    assert "0.250-0.812" in page
