"""Selects uncertain and diverse rows from a pool.

Of the least sure rows those are chosen whose words stand for the most others (facility location over a filter of
uncertain rows: Wei, Iyer, Bilmes, 2015). Doubt alone chooses outliers, and many rows of one kind.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.data.row_words import words
from finetune.evaluation.label_confidence import Floats, log_shares

WIDER, FEWEST = 10, 1000  # times as many of the least sure rows are looked at as are chosen, and so many at least
TOGETHER = 200  # rows that are chosen at a time: of so many the similarities of all candidates fit in memory
KNOWN = 4000  # rows that have answers are looked at, evenly spaced: they would fill the memory
_COLUMNS = 4096  # words of a similarity, the most frequent ones


def margins(logprobs: Floats) -> Floats:
    """The share of the likeliest label less that of the next one: 0 where a model wavers, 1 where it is sure.

    logprobs: of each label, up to a constant a row. [n, k] -> [n]
    """
    shares = np.sort(np.exp(log_shares(logprobs)), axis=1)
    made: Floats = shares[:, -1] - shares[:, -2] if shares.shape[1] > 1 else np.zeros(len(shares))
    return made


def choose(margin: Floats, texts: Sequence[str], known: Sequence[str], count: int) -> list[int]:
    """`count` rows, or all where there are fewer, the first the best to begin with.

    margin, texts: of each row. [n] each. known: texts of rows that have answers already, which stand for others too.
    """
    waiting = np.argsort(margin, kind="stable")
    chosen: list[int] = []
    seen = list(known[:: max(len(known) // KNOWN, 1)])
    while len(chosen) < count and len(waiting):
        part = min(TOGETHER, count - len(chosen))
        near = waiting[: max(WIDER * part, FEWEST)]
        vectors = _vectors([texts[i] for i in near], seen)
        picks = near[_cover(vectors[: len(near)], vectors[len(near) :], (1.0 - margin[near]) ** 2, part)]
        chosen += picks.tolist()
        seen += [texts[i] for i in picks]
        waiting = waiting[~np.isin(waiting, picks)]
    return chosen


def _vectors(texts: Sequence[str], known: Sequence[str]) -> NDArray[np.float32]:
    """Of each text its words, rare ones counting more, of length 1; texts of no such words are 0. [n, words]"""
    said = [sorted(set(words(text))) for text in [*texts, *known]]  # sorted: the same columns in every process
    frequent = Counter(word for row in said for word in row).most_common()
    columns = {word: i for i, (word, count) in enumerate([pair for pair in frequent if 1 < pair[1] < len(said)])}
    columns = {word: i for word, i in columns.items() if i < _COLUMNS}
    made = np.zeros((len(said), len(columns)), np.float32)
    for i, row in enumerate(said):
        made[i, [columns[word] for word in row if word in columns]] = 1.0
    made *= np.log(len(said) / np.maximum(made.sum(axis=0), 1.0))
    made /= np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)
    return made


def _cover(rows: NDArray[np.float32], known: NDArray[np.float32], weights: Floats, count: int) -> list[int]:
    """Greedily the rows that add the most to sum(weight * similarity to the nearest chosen or known row); the gain of a
    row only falls, so that an old one is a bound. [n, words], [m, words], [n]
    """
    alike = np.clip(rows @ rows.T, 0.0, 1.0)
    np.fill_diagonal(alike, 1.0)
    covered = np.zeros(len(rows), np.float32)
    for start in range(0, len(known), TOGETHER):
        covered = np.maximum(covered, (rows @ known[start : start + TOGETHER].T).max(axis=1))

    def gain(row: int) -> float:
        return float((weights * np.maximum(alike[row] - covered, 0.0)).sum())

    queue = [(-gain(row), row) for row in range(len(rows))]
    heapq.heapify(queue)
    chosen: list[int] = []
    while queue and len(chosen) < count:
        _, row = heapq.heappop(queue)
        now = (-gain(row), row)
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
            continue
        chosen.append(row)
        covered = np.maximum(covered, alike[row])
    return chosen
