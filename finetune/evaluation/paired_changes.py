"""Two models on the same rows: which differ, by correctness or loss, and the change in loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from finetune.evaluation.intervals import standard_error, weighted_mean_interval
from finetune.evaluation.results import Evaluation, RowResult

SIGNIFICANT = 0.05  # p-values below this
LEAST_CHANGED = 6  # rows: with fewer, McNemar's test cannot reach that, and Holm's need not count it (Tarone, 1990)


class LossChange(NamedTuple):
    """From one model to another, nats per token, each row weighted by its tokens."""

    mean: float
    interval: tuple[float, float] | None  # 95 %; None of a single row
    p_value: float  # two-sided, by the normal distribution over rows


def loss_decides(before: Evaluation, after: Evaluation) -> bool:
    """Whether the loss tells more than right and wrong: there are none, or too few open answers changed for a test."""
    if before.accuracy is None or after.accuracy is None:
        return True
    changed = sum(x.correct != y.correct for x, y in zip(before.results, after.results, strict=True))
    return not after.labels and changed < LEAST_CHANGED


def accuracy_change(before: Evaluation, after: Evaluation, of: float = 1.0) -> tuple[float, tuple[float, float] | None]:
    """Of the share of right answers on the same rows, times `of`, and its 95 % interval; None of a single row."""
    both = zip(before.results, after.results, strict=True)
    changes = [of * (bool(y.correct) - bool(x.correct)) for x, y in both]
    interval = weighted_mean_interval(changes, [1.0] * len(changes)) if len(changes) > 1 else None
    return sum(changes) / len(changes), interval


def loss_change(before: Sequence[RowResult], after: Sequence[RowResult]) -> LossChange:
    """before, after: the same rows. Raises ValueError where they are not as many."""
    differences = [y.loss - x.loss for x, y in zip(before, after, strict=True)]
    tokens = [row.tokens for row in after]
    mean = sum(d * n for d, n in zip(differences, tokens, strict=True)) / sum(tokens)
    if len(differences) < 2:
        return LossChange(mean, None, 1.0)
    interval = weighted_mean_interval(differences, tokens)
    error = standard_error(interval)
    p_value = 2 * NormalDist().cdf(-abs(mean) / error) if error > 0 else float(mean == 0)
    return LossChange(mean, interval, p_value)
