"""Confidence in given labels, by the model and by the words of the other rows.

The model has seen the rows that it judges, so it counts only as sure as it was right on rows that it had not seen. The
words judge each row by the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CLEAR = float(np.log(9))  # of a row's doubt: the other label is nine times as likely
_STEPS = 40  # halvings of the range in which the sharpness is looked for
_SHARPEST = 8.0  # log2 of the greatest and, negated, the least factor


def log_shares(logprobs: Floats) -> Floats:
    """The same, with shares that add up to 1 in each row. [n, k]"""
    top = logprobs.max(axis=1, keepdims=True)
    shares: Floats = logprobs - top - np.log(np.exp(logprobs - top).sum(axis=1, keepdims=True))
    return shares


def as_sure_as_right(logprobs: Floats, accuracy: float) -> Floats:
    """Opinions made as sure, on average, as they are right: their order stays, their mean greatest share is `accuracy`.

    logprobs: of each label, up to a constant a row. [n, k]
    """
    low, high = -_SHARPEST, _SHARPEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        sure = float(np.exp(log_shares(logprobs * 2.0**middle).max(axis=1)).mean())
        low, high = (low, middle) if sure > accuracy else (middle, high)
    return log_shares(logprobs * 2.0**low)


def filled_in(given_logprob: Floats, given: NDArray[np.int64], others: Floats) -> Floats:
    """A model's opinion of which only the given label's share is known; the rest is shared out as `others` has it.

    given_logprob: [n]; given: indices of labels [n]; others: shares as logarithms [n, k].
    """
    rows = np.arange(len(given))
    rest = others.copy()
    rest[rows, given] = -np.inf
    share = np.exp(np.minimum(given_logprob, -1e-9))
    made = log_shares(rest) + np.log1p(-share)[:, None]
    made[rows, given] = given_logprob
    return made


@dataclass(frozen=True)
class Doubts:
    """Of each row: how much speaks against its label."""

    strength: Floats  # log(share of the best other label / share of the given one); above 0 the other is likelier. [n]
    other: NDArray[np.int64]  # the best other label. [n]
    suspect: NDArray[np.bool_]  # [n]


def doubts(logprobs: Floats, given: NDArray[np.int64]) -> Doubts:
    """Of each label so many rows are suspect as are estimated to be of others, the most doubtful ones, and every row of
    which another label is clearly likelier; never one whose own label is the likeliest. logprobs: shares. [n, k]
    """
    rows = np.arange(len(given))
    rest = logprobs.copy()
    rest[rows, given] = -np.inf
    other = rest.argmax(axis=1)
    strength = rest[rows, other] - logprobs[rows, given]
    suspect = np.zeros(len(given), bool)
    for label, wrong in enumerate(_wrong_rows(logprobs, given)):
        own = np.flatnonzero(given == label)
        suspect[own[np.argsort(-strength[own], kind="stable")[:wrong]]] = True
    return Doubts(strength, other, (suspect & (strength > 0)) | (strength >= CLEAR))


def _wrong_rows(logprobs: Floats, given: NDArray[np.int64]) -> list[int]:
    """How many rows of each label are estimated to be of others: confident learning (Northcutt, Jiang, Chuang, 2021).

    A row counts for the likeliest of the labels whose share in it is at least what it is on average in the rows that
    have that label; rows that reach no such share are taken to be as those that do.
    """
    shares = np.exp(logprobs)
    labels = range(shares.shape[1])
    usual = np.array([shares[given == k, k].mean() if (given == k).any() else np.inf for k in labels])
    sure = np.where(shares >= usual, shares, -1.0)
    counted = sure.max(axis=1) >= 0
    said = sure.argmax(axis=1)
    wrong = []
    for k in labels:
        own = counted & (given == k)
        share = (said[own] != k).mean() if own.any() else 0.0
        wrong.append(round(float(share) * int((given == k).sum())))
    return wrong
