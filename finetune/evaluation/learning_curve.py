"""Learning curve: held-out loss after a quarter, a half and all training rows, extrapolated to twice as many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.evaluation.baselines import clearly_above
from finetune.evaluation.evaluate import Evaluation

SHARES = (0.25, 0.5, 1.0)  # of the training rows
SURE = 0.95  # of the interval; measured, it held the cost of twice the rows in nine of ten (tests/benchmarks)
HARDLY = 0.01  # of an accuracy, or of a loss in nats relative to it: less is not worth the labelling
_GROWS = 1.5  # times at most that a step is longer than the one before it
_LINE = (-2 / 3, 1 / 3, 4 / 3)  # the least-squares line through values at 0, 1 and 2, at 3


@dataclass(frozen=True)
class Outlook:
    """Costs: 1 - accuracy where rows are right or wrong, else nats per token."""

    costs: tuple[float, ...]  # after each of SHARES
    low: float  # of the cost after twice the rows, SURE
    high: float
    learned: bool = True  # whether all rows taught anything

    @property
    def answer(self) -> str:
        """Whether more rows would help, in a word."""
        if not self.learned:
            return "nothing learned"
        now = self.costs[-1]
        hardly = HARDLY if now < 1 else HARDLY * now
        if self.high < now:
            return "yes"
        if self.low > now - hardly:
            return "hardly"
        return "probably" if (self.low + self.high) / 2 < now - hardly else "not to be told"


def costs_of(evaluation: Evaluation) -> NDArray[np.float64]:
    """Of each held-out row: 1 where it is wrong, 0 where it is right; else its loss, a long row counting more. [n]"""
    rows = evaluation.results
    if evaluation.accuracy is not None and evaluation.labels:
        return np.array([float(not row.correct) for row in rows])
    tokens = np.array([row.tokens for row in rows], float)
    losses = np.array([row.loss for row in rows], float)
    weighted: NDArray[np.float64] = losses * tokens / tokens.mean()
    return weighted


def look_ahead(costs: Sequence[ArrayLike], majority: float | None = None) -> Outlook:
    """costs: of the same held-out rows, [n] for each of SHARES. majority: the share of their most frequent label.

    The logarithm of a loss, and the log-odds of an error, fall along a line in the logarithm of the rows (Hestness et
    al., 2017), unless the line bends. The interval takes in both: the line, and a last step that shrinks or grows as it
    did before. Around them lies the noise of a model's cost: what the last two models differ in from row to row, and
    how far the three are from a line. A model no better than the most frequent label has no line yet: one learns to
    answer at once, sooner or later, so the interval takes in all that is better.
    """
    rows = [np.asarray(one, np.float64) for one in costs]
    count = len(rows[-1])
    odds = set(np.unique(rows[-1])) <= {0.0, 1.0}
    least = 0.5 / (count + 1)  # no error in so many rows is not none at all
    means = [float(one.mean()) for one in rows]
    within = [min(max(mean, least), 1 - least) if odds else max(mean, least) for mean in means]
    a, b, c = (math.log(mean / (1 - mean)) if odds else math.log(mean) for mean in within)
    slope = within[-1] * (1 - within[-1]) if odds else within[-1]  # of a cost in its logarithm
    churn = float(np.var(rows[-1] - rows[-2])) / count / 2 / slope**2
    noise = math.sqrt(max(churn, (a - 2 * b + c) ** 2 / 6))
    line = _LINE[0] * a + _LINE[1] * b + _LINE[2] * c
    bent = c + (c - b) * (min(max((c - b) / (b - a), 0.0), _GROWS) if a != b else 0.0)
    far = NormalDist().inv_cdf(0.5 + SURE / 2) * noise * math.sqrt(1.0 + sum(weight**2 for weight in _LINE))
    low, high = (
        1 / (1 + math.exp(-end)) if odds else math.exp(end) for end in (min(line, bent) - far, max(line, bent) + far)
    )
    learned = majority is None or clearly_above(1 - means[-1], majority, count)
    return Outlook(tuple(means), low if learned else least, high, learned)
