"""Confidence intervals, paired tests, and per-label scores of a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]


RESAMPLED = 1000  # times, by the bootstrap


def _quantile(confidence: float) -> float:
    """Of the standard normal, two-sided: 1.96 for 0.95."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, not between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share (Wilson, 1927), without continuity correction.

    It stays inside 0 and 1, and has a width at 0 and at 1 too. Without rows it is (0, 1).
    """
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} rows")
    z = _quantile(confidence)
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided p-value of "a changed row is as often fixed as broken" (McNemar, 1947, in its exact form).

    p = min(1, 2 * sum(C(n, k), k = 0..min(fixed, broken)) / 2^n) with n = fixed + broken: whole numbers
    throughout, so exact for any n. Rows on which both models are right, or both wrong, do not count.
    """
    if fixed < 0 or broken < 0:
        raise ValueError(f"{fixed} rows fixed and {broken} broken")
    n = fixed + broken
    term = total = 1
    for k in range(min(fixed, broken)):
        term = term * (n - k) // (k + 1)
        total += term
    p: float = 2 * total / (1 << n)
    return min(1.0, p)


def fisher_exact(right: int, wrong: int, right_there: int, wrong_there: int) -> float:
    """Two-sided p-value of "both shares are the same" (Fisher, 1922): all tables of these sums that are no likelier."""
    here, there, rights = right + wrong, right_there + wrong_there, right + right_there
    possible = range(max(0, rights - there), min(here, rights) + 1)
    whole = _log_ways(here + there, rights)
    likely = [_log_ways(here, k) + _log_ways(there, rights - k) - whole for k in possible]
    most = likely[right - possible.start] + 1e-9  # for rounding: equally likely tables count
    return min(1.0, math.fsum(math.exp(one) for one in likely if one <= most))


def _log_ways(n: int, k: int) -> float:
    """The logarithm of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same, corrected for their number (Holm, 1979): below 0.05 the chance of any false one is below 0.05."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def weighted_mean_interval(values: ArrayLike, weights: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval of sum(w v) / sum(w) over n independent rows; for a mean loss, w are a row's tokens.

    A row's tokens belong together, so rows, not tokens, are the sample: with m the weighted mean,
    variance = n / (n - 1) * sum((w_i (v_i - m))^2) / sum(w)^2 (the ratio estimator; Cochran, 1977,
    Sampling Techniques, section 6.4). For a single row it is (-inf, inf).
    """
    v, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)  # [n], [n]
    z = _quantile(confidence)
    if v.ndim != 1 or v.shape != w.shape:
        raise ValueError(f"values {v.shape} and weights {w.shape} are not two lists of the same length")
    if (w < 0).any() or not w.sum() > 0:
        raise ValueError("weights must not be negative, nor all be zero")
    n = len(v)
    if n < 2:
        return -math.inf, math.inf
    mean = float(v @ w / w.sum())
    half = z * math.sqrt(n / (n - 1) * float(((w * (v - mean)) ** 2).sum())) / float(w.sum())
    return mean - half, mean + half


def standard_error(interval: tuple[float, float], confidence: float = 0.95) -> float:
    """Of the mean that a normal interval is of."""
    return (interval[1] - interval[0]) / (2 * _quantile(confidence))


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], k: int) -> Counts:
    """How often label i was taken for label j: [k, k], rows are the truth."""
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)  # [n], [n]
    if t.shape != p.shape:
        raise ValueError(f"{len(t)} true labels, but {len(p)} predicted labels")
    if ((t < 0) | (t >= k) | (p < 0) | (p >= k)).any():
        raise ValueError(f"the index of a label is not between 0 and {k - 1}")
    return np.bincount(t * k + p, minlength=k * k).reshape(k, k).astype(np.int64)


def worst_confusions(matrix: ArrayLike, most: int) -> list[tuple[int, int, int]]:
    """(true, predicted, rows) of the `most` most frequent confusions; equally frequent ones in the labels' order."""
    wrong = np.array(matrix, dtype=np.int64)  # [k, k]
    np.fill_diagonal(wrong, 0)
    frequent = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*(index.tolist() for index in np.unravel_index(frequent, wrong.shape)), strict=True)
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def per_class(matrix: Counts, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label; 0 where a denominator is 0, as is usual."""
    hits, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)  # [k] each
    return [
        {
            "label": label,
            "precision": float(hits[i] / max(predicted[i], 1)),
            "recall": float(hits[i] / max(truth[i], 1)),
            "f1": float(2 * hits[i] / max(truth[i] + predicted[i], 1)),
            "support": int(truth[i]),
        }
        for i, label in enumerate(labels)
    ]


def macro_f1(matrix: Counts) -> float:
    """The plain mean of F1 over the labels that occur in the truth; 0 when none does."""
    scores = [label["f1"] for label in per_class(matrix, [""] * len(matrix)) if label["support"]]
    return float(np.mean(scores)) if scores else 0.0


def macro_f1_interval(truth: Sequence[int], predicted: Sequence[int], k: int) -> tuple[float, float]:
    """The 95 % interval of macro F1: the bootstrap's percentiles over rows drawn again, the same draws every time."""
    pairs = np.array([truth, predicted], dtype=np.int64)  # [2, n]
    return _percentiles([_macro_f1(pairs[:, rows], k) for rows in _draws(pairs.shape[1])])


def macro_f1_change(truth: Sequence[int], before: Sequence[int], after: Sequence[int], k: int) -> tuple[float, float]:
    """The 95 % interval of the change of macro F1 on the same rows, as `macro_f1_interval`."""
    three = np.array([truth, before, after], dtype=np.int64)  # [3, n]
    drawn = (three[:, rows] for rows in _draws(three.shape[1]))
    return _percentiles([_macro_f1(d[[0, 2]], k) - _macro_f1(d[[0, 1]], k) for d in drawn])


def _draws(n: int) -> Iterator[Counts]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, n, n) for _ in range(RESAMPLED))


def _macro_f1(pairs: Counts, k: int) -> float:
    """As `macro_f1`, of (true, predicted) [2, n], without a matrix of k x k."""
    truth, predicted = (np.bincount(one, minlength=k) for one in pairs)
    hits = np.bincount(pairs[0][pairs[0] == pairs[1]], minlength=k)
    there = truth > 0
    return float(np.mean(2 * hits[there] / (truth + predicted)[there]))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(parts: ArrayLike, wholes: ArrayLike) -> tuple[float, float] | None:
    """The 95 % interval of sum(parts) / sum(wholes), by the bootstrap over rows; None where the whole may be 0."""
    p, w = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)  # [n], [n]
    sums = np.array([(p[rows].sum(), w[rows].sum()) for rows in _draws(len(p))])  # [RESAMPLED, 2]
    if len(p) < 2 or not np.percentile(sums[:, 1], 2.5) > 0:
        return None
    return _percentiles((sums[:, 0] / np.maximum(sums[:, 1], 1e-12)).tolist())
