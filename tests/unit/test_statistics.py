"""Intervals, the paired test and per-label figures, against scipy, known values and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from finetune.evaluation.intervals import (
    confusion_matrix,
    macro_f1,
    mcnemar_exact,
    per_class,
    ratio_interval,
    weighted_mean_interval,
    wilson_interval,
    worst_confusions,
)

shares = st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(shares, st.floats(0.5, 0.999))
def test_wilson_is_scipys(share, confidence):
    expected = stats.binomtest(*share).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*share, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(shares)
def test_wilson_holds_the_share_inside_0_and_1_and_mirrors(share):
    correct, total = share
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0 and low < high
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_known_values():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe, 1998, table I
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="correct of"):
        wilson_interval(correct, total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(3, 5, confidence)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test(fixed, broken):
    expected = stats.binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    assert mcnemar_exact(fixed, broken) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(fixed, broken) == mcnemar_exact(broken, fixed)


def test_mcnemar_known_values_and_large_counts():
    assert mcnemar_exact(0, 5) == 0.0625
    assert mcnemar_exact(8, 1) == pytest.approx(0.0390625)
    assert mcnemar_exact(7, 7) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(10_100, 10_000) == pytest.approx(stats.binomtest(10_100, 20_100).pvalue, rel=1e-6)
    assert mcnemar_exact(0, 5000) == 0.0  # 2^-4999 is below the smallest float
    with pytest.raises(ValueError, match="-1 rows fixed"):
        mcnemar_exact(-1, 4)


def test_mean_interval_of_equal_weights_is_the_textbooks():
    values = np.random.default_rng(0).gamma(2.0, size=50)
    half = stats.norm.ppf(0.975) * stats.sem(values)
    expected = (values.mean() - half, values.mean() + half)
    assert weighted_mean_interval(values, np.full(50, 7)) == pytest.approx(expected, rel=1e-12)


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 500)), min_size=2, max_size=30),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_mean_interval_follows_scale_and_shift(rows, factor, shift):
    values, weights = np.array([v for v, _ in rows]), np.array([w for _, w in rows])
    low, high = weighted_mean_interval(values, weights)
    assert low - 1e-9 <= np.average(values, weights=weights) <= high + 1e-9
    assert weighted_mean_interval(values * factor + shift, weights * 3) == pytest.approx(
        (low * factor + shift, high * factor + shift), abs=1e-6
    )


def test_mean_interval_covers_as_often_as_it_says():
    """Long rows with a higher loss, 400 samples of 200 rows: the true token mean lies inside about 95 times in 100."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, size=(400, 200))
    losses = 0.02 * lengths + rng.gamma(2.0, 0.5, size=lengths.shape)
    sizes = np.arange(1, 60)
    truth = float((sizes * (0.02 * sizes + 1.0)).sum() / sizes.sum())
    inside = 0
    for values, weights in zip(losses, lengths, strict=True):
        low, high = weighted_mean_interval(values, weights)
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_mean_interval_refuses_what_has_no_mean():
    assert weighted_mean_interval([2.0], [3]) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="same length"):
        weighted_mean_interval([1.0, 2.0], [1])
    for weights in ([0, 0], [2, -1]):
        with pytest.raises(ValueError, match="must not be negative"):
            weighted_mean_interval([1.0, 2.0], weights)


labels = st.integers(1, 6).flatmap(
    lambda k: st.tuples(
        st.just(k), st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=60)
    )
)


@given(labels)
@settings(max_examples=60)
def test_figures_of_each_label_by_counting(case):
    k, pairs = case
    matrix = confusion_matrix([t for t, _ in pairs], [p for _, p in pairs], k)
    assert matrix.shape == (k, k) and matrix.sum() == len(pairs)
    for i, one in enumerate(per_class(matrix, [f"label {i}" for i in range(k)])):
        true = [p for t, p in pairs if t == i]
        taken = [t for t, p in pairs if p == i]
        precision = taken.count(i) / len(taken) if taken else 0.0
        recall = true.count(i) / len(true) if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert one == {
            "label": f"label {i}",
            "precision": pytest.approx(precision),
            "recall": pytest.approx(recall),
            "f1": pytest.approx(f1),
            "support": len(true),
        }


def test_rows_of_the_matrix_are_the_truth():
    matrix = confusion_matrix([0, 0, 0, 1], [1, 1, 0, 1], 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert matrix.dtype == np.int64
    assert macro_f1(matrix) == pytest.approx((2 * 1 / 4 + 2 * 1 / 4) / 2)  # the third label never occurs


def test_macro_f1_of_nothing_is_zero():
    assert macro_f1(confusion_matrix([], [], 2)) == 0.0


@pytest.mark.parametrize(("truth", "predicted"), [([2], [0]), ([0], [2]), ([-1], [0])])
def test_an_index_outside_the_labels_is_refused(truth, predicted):
    with pytest.raises(ValueError, match="not between 0 and 1"):
        confusion_matrix(truth, predicted, 2)


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="2 true labels, but 1 predicted"):
        confusion_matrix([0, 1], [0], 2)


def test_the_worst_confusions_come_first_and_equal_ones_in_the_labels_order():
    matrix = [[9, 1, 0], [3, 9, 1], [0, 3, 0]]
    assert worst_confusions(matrix, 9) == [(1, 0, 3), (2, 1, 3), (0, 1, 1), (1, 2, 1)]
    assert worst_confusions(matrix, 1) == [(1, 0, 3)]
    assert worst_confusions([[5, 0], [0, 5]], 9) == []
    assert matrix[0][0] == 9, "it only looks"


def test_the_interval_of_a_ratio_is_that_of_the_rows() -> None:
    wholes = np.random.default_rng(0).uniform(0.5, 1.5, 400)
    assert ratio_interval(wholes * 0.8, wholes) == pytest.approx((0.8, 0.8))
    parts = 0.8 * wholes + np.random.default_rng(1).normal(0, 0.5, 400)
    low, high = ratio_interval(parts, wholes) or (0.0, 0.0)
    width = 2 * 1.96 * 0.5 / np.sqrt(400)  # of the mean of the noise; the mean of the wholes is 1
    assert low < 0.8 < high and high - low == pytest.approx(width, rel=0.15)


def test_a_ratio_to_nothing_has_no_interval() -> None:
    assert ratio_interval([1.0, 2.0], [1.0, -1.0]) is None
    assert ratio_interval([0.5], [1.0]) is None
