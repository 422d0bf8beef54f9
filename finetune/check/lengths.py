"""Row lengths, truncation, and the share of padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.data.collate import groups, order, width
from finetune.data.rows import Prepared, Problem
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
    shortened: list[str] = field(default_factory=list)  # locations whose prompt gave way
    cut: list[str] = field(default_factory=list)  # locations that lost their end
    dropped: list[Problem] = field(default_factory=list)


def measure(prepared: Prepared, recipe: Recipe) -> Lengths:
    """Train must have examples. What was cut or dropped is that of all splits."""
    settings, splits = recipe.train, prepared.splits
    before, after = prepared.train.lengths, [len(example) for example in prepared.train.examples]
    steps = order(len(after), settings.batch_size, recipe.seed, 0)
    planned = [[after[i] for i in step] for step in steps]
    planned = [[step[i] for i in rows] for step in planned for rows in groups(step, settings.tokens_at_once)]
    naive = [after[start : start + settings.batch_size] for start in range(0, len(after), settings.batch_size)]
    cut = [example.location for split in splits for example in split.examples if example.cut]
    ended = frozenset(cut)
    return Lengths(
        rows=len(before),
        percentiles={rank: int(np.percentile(before, rank, method="inverted_cdf")) for rank in PERCENTILES},
        histogram=histogram(before),
        max_length=settings.max_length,
        padding=padding(planned),
        padding_naive=padding(naive),
        shortened=[location for split in splits for location in split.shortened if location not in ended],
        cut=cut,
        dropped=[problem for split in splits for problem in split.dropped],
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
