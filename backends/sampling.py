"""What generation has in common on every backend: which prompts run together, and how a token is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROMPTS_TOGETHER = 32


def groups(lengths: Sequence[int], spread: int) -> Iterator[list[int]]:
    """Rows whose lengths differ by no more than `spread`, the shortest first."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if group and (len(group) == PROMPTS_TOGETHER or lengths[row] > lengths[group[0]] + spread):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens several prompts begin with in common, each keeping one at least of its own; 0 for one prompt."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in order, so the two that differ earliest
    return next((place for place in range(most) if first[place] != last[place]), most)


class Draws:
    """Tokens at a temperature. What is drawn for a prompt depends on the seed and its place among all prompts alone."""

    def __init__(self, prompts: int, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generators = [np.random.default_rng((seed, row)) for row in range(prompts)]

    def choose(self, logits: NDArray[Any], rows: Sequence[int]) -> list[int]:
        """A token for each of `rows` from its `logits` [N, V]."""
        scores = logits.astype(np.float64) / self._temperature
        return [sample(own, self._generators[row]) for own, row in zip(scores, rows, strict=True)]


def sample(scores: NDArray[np.float64], draw: np.random.Generator) -> int:
    """A token from the softmax of `scores` [vocab], by inversion of its distribution function."""
    cumulative = np.cumsum(np.exp(scores - scores.max()))
    return min(int(np.searchsorted(cumulative, draw.random() * cumulative[-1], side="right")), len(scores) - 1)
