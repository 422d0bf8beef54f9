"""Preference losses: DPO and ORPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.rows import Example
from finetune.evaluation.pairs import Pairs, lengths, references
from finetune.recipe.schema import Recipe

CERTAIN = -1e-6  # nats: an answer more probable than this per token counts as that probable, for its odds have no bound

Reals = NDArray[np.float64]


class PairLoss(Protocol):
    def margins(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        """By how much each pair's better answer leads, above 0 where it does. [n]"""

    def losses(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        """In nats. [n]"""

    def slopes(self, examples: Sequence[Example], logprobs: Pairs) -> Pairs:
        """The derivatives of each loss by both log-probabilities."""


@dataclass(frozen=True)
class DPO:
    """Rafailov et al., 2023: log(1 + exp(-margin)).

    c and r are the log-probabilities of the better and the worse answer, c0 and r0 those of the model without its
    adapter. The margin is beta ((c - c0) - (r - r0)).
    """

    beta: float

    def margins(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        change = logprobs - references(examples)
        return self.beta * (change[:, 0] - change[:, 1])

    def losses(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        return np.logaddexp(0.0, -self.margins(examples, logprobs))

    def slopes(self, examples: Sequence[Example], logprobs: Pairs) -> Pairs:
        pull = self.beta * _lost(self.margins(examples, logprobs))
        return np.stack([-pull, pull], 1)


@dataclass(frozen=True)
class ORPO:
    """Hong et al., 2024: -c + beta log(1 + exp(-margin)), the paper's lambda being beta.

    c and r are the mean log-probabilities per token. The margin is the logarithm of the ratio of the odds exp(c) /
    (1 - exp(c)) and exp(r) / (1 - exp(r)). No other model is referred to.
    """

    beta: float

    def margins(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        mean = _means(examples, logprobs)
        odds = mean - np.log(-np.expm1(mean))
        return odds[:, 0] - odds[:, 1]

    def losses(self, examples: Sequence[Example], logprobs: Pairs) -> Reals:
        of_better = logprobs[:, 0] / lengths(examples)[:, 0]
        return self.beta * np.logaddexp(0.0, -self.margins(examples, logprobs)) - of_better

    def slopes(self, examples: Sequence[Example], logprobs: Pairs) -> Pairs:
        pull = self.beta * _lost(self.margins(examples, logprobs))[:, None]
        by_mean = pull / -np.expm1(_means(examples, logprobs)) * np.array([-1.0, 1.0]) - np.array([1.0, 0.0])
        slopes: Pairs = by_mean / lengths(examples)
        return slopes


def pair_loss(recipe: Recipe) -> PairLoss | None:
    """None where the recipe has no pairs."""
    asked = recipe.preferences
    if asked is None:
        return None
    return DPO(asked.beta) if asked.loss == "dpo" else ORPO(asked.beta)


def _lost(margin: Reals) -> Reals:
    """What the better answer lacks to be sure to win: 1 / (1 + exp(margin)). [n]"""
    return np.exp(-np.logaddexp(0.0, margin))


def _means(examples: Sequence[Example], logprobs: Pairs) -> Pairs:
    """Per token."""
    return np.minimum(logprobs / lengths(examples), CERTAIN)
