"""Model strengths from pairwise votes (Bradley and Terry, 1952), and a test for position bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.intervals import mcnemar_exact
from finetune.text import p_text

Choice = Literal["left", "right", "tie", "skip"]
Floats = NDArray[np.float64]
Interval = tuple[float, float]

BIASED = 0.01  # p-values below this
_Z = 1.959964  # of 95 %, two-sided
_ELO = 400 / math.log(10)  # points of a strength of 1
_MEAN_ELO = 1000.0
_ROUNDS = 200  # of Newton's method; some ten are enough
_STEP = 2.0  # the most that a strength moves in one of them


@dataclass(frozen=True)
class Vote:
    """One line of the file of votes: which of two answers to a row is the better one."""

    row: str
    left: str  # the models
    right: str
    vote: Choice
    left_answer: str
    right_answer: str

    @property
    def pair(self) -> tuple[str, frozenset[str]]:
        """What is voted on, whichever side each stands on."""
        return self.row, frozenset((self.left, self.right))


@dataclass(frozen=True)
class Standing:
    """One model among the others. The strengths' mean is 0, and p(a beats b) = 1 / (1 + exp(b - a))."""

    model: str
    won: int
    lost: int
    tied: int
    strength: float
    interval: Interval  # 95 %

    @property
    def elo(self) -> tuple[float, Interval]:
        """The same in Elo's points, whose mean is 1000."""
        low, high = (_MEAN_ELO + _ELO * bound for bound in self.interval)
        return _MEAN_ELO + _ELO * self.strength, (low, high)


@dataclass(frozen=True)
class Preference:
    """How often the first of two models is preferred to the second, by the strengths of all."""

    first: str
    second: str
    share: float
    interval: Interval  # 95 %


@dataclass(frozen=True)
class Standings:
    """Of all models, the strongest first. Without strengths where votes do not link them all."""

    models: tuple[Standing, ...]
    preferences: tuple[Preference, ...]  # the stronger one first


def standings(models: Sequence[str], votes: Sequence[Vote]) -> Standings | None:
    """From the votes between these models; a tie is half a win to each. None where they do not link all of them.

    So that a model which always wins has a finite strength, every pair that met is given a little: together one vote
    for each strength, half of it to either side (with two models: Jeffreys' prior). The intervals are Wald's, with the
    variance that the votes have (White, 1980), which is smaller where many are ties.
    """
    number = {model: i for i, model in enumerate(models)}
    wins, ties = np.zeros((len(models),) * 2), np.zeros((len(models),) * 2)  # [k, k] row over column
    for vote in votes:
        if vote.left not in number or vote.right not in number or vote.vote == "skip":
            continue
        left, right = number[vote.left], number[vote.right]
        if vote.vote == "tie":
            ties[left, right] += 1
            ties[right, left] += 1
        else:
            wins[(left, right) if vote.vote == "left" else (right, left)] += 1
    met = (wins + wins.T + ties) > 0
    if not _linked(met):
        return None
    extra = met * (len(models) - 1) / met.sum()  # met counts each pair twice
    strengths, covariance = _bradley_terry(wins + extra, ties)
    order = sorted(range(len(models)), key=lambda i: -strengths[i])
    stands = []
    for i in order:
        won, lost, tied = int(wins[i].sum()), int(wins[:, i].sum()), int(ties[i].sum())
        half = _Z * math.sqrt(max(covariance[i, i], 0.0))
        strength = float(strengths[i])
        stands.append(Standing(models[i], won, lost, tied, strength, (strength - half, strength + half)))
    preferred = tuple(_preference(models, strengths, covariance, *pair) for pair in combinations(order, 2))
    return Standings(tuple(stands), preferred)


def _linked(met: NDArray[np.bool_]) -> bool:
    """Whether votes lead from the first model to every other one."""
    reached, before = {0}, 0
    while len(reached) > before:
        before = len(reached)
        reached |= {int(j) for i in reached for j in np.flatnonzero(met[i])}
    return len(reached) == len(met) > 1


def _bradley_terry(wins: Floats, ties: Floats) -> tuple[Floats, Floats]:
    """Strengths [k], whose sum is 0, and their covariance [k, k], by Newton's method."""
    strengths = np.zeros(len(wins))
    together = wins + wins.T + ties
    for _ in range(_ROUNDS):
        p = 1 / (1 + np.exp(strengths - strengths[:, None]))  # [k, k] row over column
        gradient = (wins + ties / 2 - together * p).sum(axis=1)
        inverse = np.linalg.pinv(_laplacian(together * p * (1 - p)), hermitian=True)
        move = inverse @ gradient
        strengths = strengths + move / max(1.0, float(np.abs(move).max()) / _STEP)
        if np.abs(move).max() < 1e-10:
            break
    spread = wins * (1 - p) ** 2 + wins.T * p**2 + ties * (0.5 - p) ** 2
    return strengths - strengths.mean(), inverse @ _laplacian(spread) @ inverse


def _laplacian(weights: Floats) -> Floats:
    """Of the graph whose edges have these weights: sum of w (e_i - e_j)(e_i - e_j)^T over its pairs."""
    return np.diag(weights.sum(axis=1)) - weights


def _preference(models: Sequence[str], strengths: Floats, covariance: Floats, a: int, b: int) -> Preference:
    gap = float(strengths[a] - strengths[b])
    half = _Z * math.sqrt(max(float(covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]), 0.0))
    low, share, high = (1 / (1 + math.exp(-x)) for x in (gap - half, gap, gap + half))
    return Preference(models[a], models[b], share, (low, high))


def position_bias(votes: Sequence[Vote]) -> tuple[int, int, float]:
    """Votes for the left and for the right answer, and the two-sided p-value of "the side did not matter"."""
    left, right = (sum(vote.vote == side for vote in votes) for side in ("left", "right"))
    return left, right, mcnemar_exact(left, right)


def about_position(votes: Sequence[Vote]) -> str:
    """In a sentence."""
    left, right, p_value = position_bias(votes)
    figures = (
        f"the left answer won {left} of {left + right} votes that decided (exact binomial test: {p_text(p_value)})"
    )
    if p_value >= BIASED:
        return f"Position: no sign that the side mattered: {figures}."
    more = "left" if left > right else "right"
    return f"Position bias: {figures}. The {more} side won by being there, so the strengths say too little."
