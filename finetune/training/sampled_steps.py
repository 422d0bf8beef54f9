"""How the steps of an epoch are cut into micro-batches, told by a sample of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from backends.memory_plan import Micro
from finetune.data.collate import groups, step_indices, width
from finetune.data.rows import Example

SAMPLED = 64  # steps whose micro-batches are looked at; the one with the longest row is always among them


class Cut(NamedTuple):
    """The micro-batches of an epoch's steps."""

    lengths: list[int]  # of the rows of those that were looked at, as they are computed: padded; shared prefixes once
    batches: float  # of the whole epoch, or pieces of them that are computed together
    scale: float  # how many times as many steps the epoch has as were looked at


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
