"""Batches of preference pairs: both answers side by side, their shared prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from backends.interface import Batch
from finetune.data.collate import SHARED_AT_LEAST, width
from finetune.data.rows import Example


def pair_batches(examples: Sequence[Example], micro_tokens: int, share: bool) -> list[tuple[list[int], Batch]]:
    """Every pair once, the longest first: (pairs, batch). Row 2i of a batch is the better answer of its pair i.

    share: whether a batch's prefixes are computed once (`Session.shares_prefixes`); else, and where prompts are short,
    prompts are written out. A pair is never parted, so one pair may be more than micro_tokens.
    """
    before = [_shared(example) if share else 0 for example in examples]
    rest = [max(len(one) for one in _both(example)) - skip - 1 for example, skip in zip(examples, before, strict=True)]
    made: list[list[int]] = []
    largest = (0, 0, False)  # prefix, width, and whether prompts are shared, of the batch in hand
    for pair in sorted(range(len(examples)), key=lambda i: (before[i] > 0, -before[i] - 2 * rest[i])):
        wide, shared = width(rest[pair]), before[pair] > 0
        grown = max(largest[0], before[pair]), max(largest[1], wide), shared
        each = grown[0] + 2 * (grown[1] + grown[0] // 4)  # as `collate.groups` counts keys and values of the prefix
        if not made or shared != largest[2] or (len(made[-1]) + 1) * each > micro_tokens:
            made.append([])
            grown = before[pair], wide, shared
        made[-1].append(pair)
        largest = grown
    return [(pairs, _batch([examples[i] for i in pairs], [before[i] for i in pairs], pairs)) for pairs in made]


def as_one(example: Example) -> Example:
    """A pair as a row of as many tokens as are computed of it: its prompt once, and its shorter answer padded to the
    longer; other examples as they are.
    """
    if example.rejected is None:
        return example
    rest, pad = slice(len(example.prompt_tokens), None), abs(len(example) - len(example.rejected))
    tokens = np.concatenate([example.tokens, example.rejected.tokens[rest], np.zeros(pad, np.int32)])
    weights = np.concatenate([example.weights, example.rejected.weights[rest], np.zeros(pad, np.float32)])
    return replace(example, tokens=tokens, weights=weights, rejected=None)


def _shared(example: Example) -> int:
    """Of the prompt all but its last token, which predicts both answers' first."""
    count = len(example.prompt_tokens) - 1
    return count if count >= SHARED_AT_LEAST else 0


def _both(example: Example) -> tuple[Example, Example]:
    assert example.rejected is not None
    return example, example.rejected


def _batch(examples: Sequence[Example], before: Sequence[int], pairs: Sequence[int]) -> Batch:
    rows = [(one, skip) for example, skip in zip(examples, before, strict=True) for one in _both(example)]
    shape = len(rows), width(max(len(one) - skip for one, skip in rows) - 1)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (one, skip) in enumerate(rows):
        n = len(one) - skip - 1
        inputs[row, :n], targets[row, :n] = one.tokens[skip:-1], one.tokens[skip + 1 :]
        weights[row, :n] = one.weights[skip + 1 :]
    numbers = tuple(2 * pair + side for pair in pairs for side in (0, 1))
    if not before[0]:
        return Batch(inputs, targets, weights, rows=numbers)
    prefixes = tuple(example.tokens[:skip] for example, skip in zip(examples, before, strict=True))
    return Batch(inputs, targets, weights, prefixes, tuple(row // 2 for row in range(len(rows))), numbers)
