"""How long rows are, what is cut, and how much of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.data.collate import groups, order, width
from finetune.data.problems import Problem
from finetune.recipe.schema import Recipe

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
BINS = 12


@dataclass(frozen=True)
class Lengths:
    """Of the training rows, in tokens."""

    rows: int
    percentiles: dict[int, int]  # before anything is cut
    histogram: list[tuple[int, int, int]]  # (from, below, rows)
    max_length: int
    padding: float  # share of an epoch's positions, in the batches that are made
    padding_naive: float  # in batches of the same size in the file's order
    shortened: list[str] = field(default_factory=list)  # places whose prompt gave way
    cut: list[str] = field(default_factory=list)  # places that lost their end
    dropped: list[Problem] = field(default_factory=list)


def measure(
    before: Sequence[int],
    after: Sequence[int],
    recipe: Recipe,
    shortened: list[str],
    cut: list[str],
    dropped: list[Problem],
) -> Lengths:
    """before: lengths of all rows; after: of those that are trained on, in order."""
    settings = recipe.train
    steps = order(len(after), settings.batch_size, recipe.seed, 0)
    planned = [[after[i] for i in step] for step in steps]
    planned = [[step[i] for i in rows] for step in planned for rows in groups(step, settings.tokens_at_once)]
    naive = [after[start : start + settings.batch_size] for start in range(0, len(after), settings.batch_size)]
    return Lengths(
        len(before),
        {one: int(np.percentile(before, one, method="inverted_cdf")) for one in PERCENTILES},
        histogram(before),
        settings.max_length,
        padding(planned),
        padding(naive),
        shortened,
        cut,
        dropped,
    )


def padding(batches: Sequence[Sequence[int]]) -> float:
    """The share of positions that hold no token. A row of n tokens has n - 1 positions, input and target."""
    whole = sum(len(rows) * width(max(rows) - 1) for rows in batches)
    return 1 - sum(length - 1 for rows in batches for length in rows) / whole


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bins of equal width on a logarithmic scale, since most data have a long tail."""
    low, high = max(min(lengths), 1), max(lengths) + 1
    edges = np.unique(np.geomspace(low, high, BINS + 1).round().astype(int))
    edges[-1] = high
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
