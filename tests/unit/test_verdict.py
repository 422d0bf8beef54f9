"""Overfitting is called where it is and nowhere else; the comparison's word follows the test, not the eye."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import mcnemar_exact, wilson_interval
from finetune.evaluation.verdict import comparison_verdict, overfitting_verdict
from finetune.events import Validated


def table(*rows: tuple[float | None, float], start: int = 0, per_epoch: int = 1) -> list[Validated]:
    """Rows of (training loss, validation loss), the first one at step `start`."""
    return [
        Validated(
            step=10 * i,
            epoch=i / per_epoch,
            train_loss=train,
            loss=loss,
            perplexity=2.0,
            token_accuracy=0.5,
            accuracy=None,
            best=False,
            seconds=1.0,
        )
        for i, (train, loss) in enumerate(rows, start)
    ]


def test_the_film_review_tutorial_overfits_from_its_first_epoch():
    found = overfitting_verdict(table((0.45, 0.423), (0.25, 0.51), (0.09, 0.78), (0.0095, 1.035), start=1))
    assert (found.verdict, found.best_epoch, found.best_loss) == ("overfitting", 1.0, 0.423)
    assert "from 0.423 at epoch 1 to 1.035 at epoch 4" in found.message
    assert "from 0.45 to 0.0095" in found.message and found.message.endswith("Stop at epoch 1.")


def test_the_row_before_training_counts_as_epoch_zero():
    found = overfitting_verdict(table((None, 0.3), (0.5, 0.4), (0.2, 0.6)))
    assert (found.verdict, found.best_epoch) == ("overfitting", 0.0)
    assert "No epoch beat the model before training" in found.message


def test_a_part_of_an_epoch_is_named():
    found = overfitting_verdict(table((None, 0.9), (0.8, 0.7), (0.6, 0.5), (0.4, 0.8), per_epoch=3))
    assert found.message.endswith("Stop at epoch 0.67.")


@pytest.mark.parametrize("rows", [[(None, 0.9)], [(None, 0.9), (0.8, 1.2)], [(0.8, 0.7)]])
def test_one_validation_is_too_short(rows):
    found = overfitting_verdict(table(*rows))
    assert found.verdict == "too short to say"
    assert found.best_loss == min(loss for _, loss in rows)


def test_still_falling_is_no_overfitting():
    found = overfitting_verdict(table((None, 2.0), (1.5, 1.4), (1.2, 1.1)))
    assert (found.verdict, found.best_epoch) == ("none", 2.0)
    assert "more training may help" in found.message
    by_itself = overfitting_verdict(table((None, 2.0), (1.5, 1.4), (1.2, 1.9)), enough=True)
    assert by_itself.verdict == "none" and "1.4 at epoch 1, which is kept, to 1.9 at epoch 2" in by_itself.message
    worse = overfitting_verdict(table((None, 2.0), (1.5, 2.4), (1.2, 2.9)), enough=True)
    assert worse.verdict == "overfitting", "no epoch beat the model before training"
    ended = overfitting_verdict(table((None, 2.0), (1.5, 1.4), (1.2, 1.39)), enough=True)
    assert ended.verdict == "none" and "more training" not in ended.message and "ended by itself" in ended.message


def test_noise_below_one_per_cent_is_no_overfitting():
    found = overfitting_verdict(table((None, 2.0), (1.5, 1.000), (1.2, 1.009)))
    assert found.verdict == "none" and "stays near it" in found.message


def test_both_losses_rising_is_another_trouble():
    found = overfitting_verdict(table((None, 2.0), (1.0, 1.0), (1.5, 3.0)))
    assert found.verdict == "none" and "lower the learning rate" in found.message


@given(
    st.lists(st.tuples(st.floats(0.001, 20), st.floats(0.001, 20)), min_size=2, max_size=12),
    st.booleans(),
)
def test_the_verdict_is_its_definition(rows, with_base):
    losses = table(*([(None, 21.0)] if with_base else []), *rows, start=0 if with_base else 1)
    found = overfitting_verdict(losses)
    best = min(range(len(rows)), key=lambda i: rows[i][1])
    overfits = rows[-1][1] > rows[best][1] * 1.01 and rows[-1][0] < rows[best][0]
    assert found.verdict == ("overfitting" if overfits else "none")
    assert (found.best_epoch, found.best_loss) == (best + 1, rows[best][1])
    assert ("Stop at" in found.message) == overfits


def evaluation(
    correct: list[bool | None], losses: list[float] | None = None, labels: tuple[str, ...] = ("bad", "good")
) -> Evaluation:
    losses = losses or [1.0] * len(correct)
    rows = tuple(
        RowResult(f"test.jsonl:{i + 1}", "", None, None, ok, loss, tokens=2 + i % 3)
        for i, (ok, loss) in enumerate(zip(correct, losses, strict=True))
    )
    tokens = sum(row.tokens for row in rows)
    judged = [row for row in rows if row.correct is not None]
    right = sum(bool(row.correct) for row in judged)
    return Evaluation(
        rows=len(rows),
        tokens=tokens,
        loss=sum(row.loss * row.tokens for row in rows) / tokens,
        perplexity=1.0,
        token_accuracy=0.5,
        accuracy=right / len(judged) if judged else None,
        interval=wilson_interval(right, len(judged)) if judged else None,
        macro_f1=None,
        labels=labels,
        confusion=None,
        results=rows,
    )


def test_open_answers_are_judged_word_for_word_or_else_by_their_loss():
    some, more = evaluation([False] * 90 + [True] * 10, labels=()), evaluation([True] * 100, labels=())
    assert comparison_verdict(some, more, mcnemar_exact(90, 0)).startswith("Better: exact match 0.100")
    none = evaluation([False] * 100, labels=())
    assert comparison_verdict(none, none, 1.0).startswith("No clear difference: loss")
    losses = [2.0 + 0.1 * (i % 7) for i in range(100)]
    base = evaluation([False] * 100, losses, labels=())
    for matches, by in ((5, "loss"), (6, "exact match")):  # McNemar's test cannot tell five changes from chance
        tuned = evaluation([i < matches for i in range(100)], [loss - 0.3 for loss in losses], labels=())
        found = comparison_verdict(base, tuned, mcnemar_exact(matches, 0))
        assert found.startswith(f"Better: {by}")
    worse = evaluation([i < 3 for i in range(100)], [loss + 0.3 for loss in losses], labels=())
    found = comparison_verdict(base, worse, mcnemar_exact(3, 0))
    assert found.startswith("Worse: loss") and found.endswith("; exact match 0.000 before, 0.030 after.")


def verdict_of(before: list[bool], after: list[bool]) -> str:
    fixed = sum(b < a for b, a in zip(before, after, strict=True))
    broken = sum(b > a for b, a in zip(before, after, strict=True))
    return comparison_verdict(evaluation(before), evaluation(after), mcnemar_exact(fixed, broken))


def test_a_clear_gain_and_a_clear_loss():
    low, high = [i < 52 for i in range(100)], [i < 90 for i in range(100)]
    better = verdict_of(low, high)
    assert better.startswith("Better: accuracy 0.520 (0.423 to 0.615) before, 0.900 (0.826 to 0.945) after")
    assert "the same 100 rows" in better and "p < 0.0001" in better
    assert verdict_of(high, low).startswith("Worse: accuracy 0.900")


def test_a_gain_that_chance_explains():
    found = verdict_of([i < 52 for i in range(100)], [i < 56 for i in range(100)])
    assert found.startswith("No clear difference") and "p = 0.12" in found


def test_the_rows_decide_not_the_overlap_of_intervals():
    """Eight rows fixed and none broken is clear although both intervals overlap widely."""
    assert verdict_of([i < 52 for i in range(100)], [i < 60 for i in range(100)]).startswith("Better")


def test_the_same_answers():
    assert verdict_of([True, False] * 10, [True, False] * 10).startswith("No clear difference")


def by_loss(before: list[float], after: list[float]) -> str:
    none: list[bool | None] = [None] * len(before)
    return comparison_verdict(evaluation(none, before), evaluation(none, after), None)


def test_without_answers_the_loss_decides():
    high, low = [2.0 + 0.1 * (i % 7) for i in range(30)], [1.8 + 0.1 * (i % 5) for i in range(30)]
    assert by_loss(high, low).startswith("Better: loss 2.")
    assert by_loss(low, high).startswith("Worse: loss 2.0000 before, 2.2822 after")
    noisy = [loss + (1 if i % 2 else -1) for i, loss in enumerate(high)]
    assert by_loss(high, noisy).startswith("No clear difference: loss")


def test_the_same_losses_are_no_difference():
    assert by_loss([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).startswith("No clear difference")


def test_the_loss_comparison_is_paired():
    """Rows differ by far more than the models do; row by row the small gain is plain."""
    before = [float(i) for i in range(40)]
    assert by_loss(before, [loss - 0.05 - 0.001 * (i % 3) for i, loss in enumerate(before)]).startswith("Better")


def test_other_rows_are_refused():
    short = evaluation([None, None])
    with pytest.raises(ValueError, match="zip"):
        comparison_verdict(short, dataclasses.replace(short, results=short.results[:1]), None)
