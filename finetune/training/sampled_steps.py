"""How the steps of an epoch are cut into micro-batches, told by a sample of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from backends.memory_plan import Micro
from finetune.data.collate import groups, step_indices, width
from finetune.data.rows import Example

SAMPLED = 64  # steps whose micro-batches are looked at; the one with the longest row is always among them


@dataclass(frozen=True)
class Rows:
    """Sums over rows that pass through a model's blocks."""

    count: float
    tokens: float
    pairs: float  # of a query and a key in one head

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: int = 0) -> Rows:
        """lengths: in tokens, without those of a prefix that was computed before, whose keys they look at too."""
        tokens = np.array(lengths, np.float64)
        return cls(len(lengths), float(tokens.sum()), float((tokens * (tokens + prefix)).sum()))

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.count + other.count, self.tokens + other.tokens, self.pairs + other.pairs)

    def __mul__(self, times: float) -> Rows:
        return Rows(self.count * times, self.tokens * times, self.pairs * times)


NO_ROWS = Rows.of([])


class Cut(NamedTuple):
    """The micro-batches of an epoch's steps, told by those of some of them."""

    rows: Rows  # as they are computed: padded; shared prefixes once in each micro-batch
    batches: float  # micro-batches, or pieces of them that are computed together


def largest_micro(examples: Sequence[Example], batch_size: int, seed: int, micro_tokens: int) -> Micro:
    """The micro-batch of the first epoch with the most tokens; of many steps, only a sample is looked at."""
    n = len(examples)
    steps = -(-n // batch_size)
    longest = max(range(n), key=lambda i: len(examples[i].tokens))
    chosen = {step: step_indices(n, batch_size, seed, step) for step in range(min(steps, SAMPLED))}
    chosen |= {} if steps <= SAMPLED else {-1: [longest]}
    largest = Micro(1, 1, 1)
    for rows in chosen.values():
        for group in groups([len(examples[i].tokens) for i in rows], micro_tokens):
            members = [examples[rows[i]] for i in group]
            padded = width(max(len(example.tokens) for example in members) - 1)
            if len(members) * padded > largest.tokens:
                supervised = sum(int(np.count_nonzero(example.weights[1:])) for example in members)
                largest = Micro(len(members), padded, supervised)
    return largest
