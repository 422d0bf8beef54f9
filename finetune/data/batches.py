"""Examples to batches: which examples a step sees, and how memory cuts them into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch
from finetune.examples import Example

WIDTHS = 8  # widths are rounded up to a multiple: fewer different shapes to compile for


def order(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """For each optimiser step of an epoch the examples it sees: every example once, a short step last.

    A pure function, from the raw stream of PCG64, which numpy keeps the same in every version.
    """
    shuffled = _shuffled(n, seed, epoch)
    return [shuffled[start : start + batch_size].tolist() for start in range(0, n, batch_size)]


def step_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of a step, counted from 0 over all epochs."""
    epoch, within = divmod(step, -(-n // batch_size))
    found: list[int] = _shuffled(n, seed, epoch)[within * batch_size : (within + 1) * batch_size].tolist()
    return found


@lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")  # [n]


def micro_batches(examples: Sequence[Example], micro_tokens: int) -> list[Batch]:
    """One step's examples, grouped by length, each group within micro_tokens of padded tokens.

    The longest come first, so that memory runs out at once or not at all. An example longer than the budget
    is alone in its batch.
    """
    return [batch for _, batch in evaluation_batches(examples, micro_tokens)]


def evaluation_batches(examples: Sequence[Example], micro_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Every example once, in a fixed order: (indices, batch), made one at a time."""
    for rows in groups([len(one.tokens) for one in examples], micro_tokens):
        yield rows, collate([examples[i] for i in rows])


def groups(lengths: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
    """Rows of like lengths (in tokens) that go into one batch, the longest first."""
    rows: list[int] = []
    wide = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if rows and (len(rows) + 1) * wide > micro_tokens:
            yield rows
            rows = []
        if not rows:
            wide = width(lengths[i] - 1)
        rows.append(i)
    if rows:
        yield rows


def width(positions: int) -> int:
    """Of a batch whose longest row has so many positions."""
    return max(-(-positions // WIDTHS), 1) * WIDTHS


def collate(examples: Sequence[Example]) -> Batch:
    """Shifted and padded on the right: inputs, targets, weights [B, T]; T is rounded up to a multiple of 8."""
    shape = (len(examples), width(max(len(example.tokens) for example in examples) - 1))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, example in enumerate(examples):
        n = len(example.tokens) - 1
        inputs[row, :n] = example.tokens[:-1]
        targets[row, :n] = example.tokens[1:]
        weights[row, :n] = example.weights[1:]
    return Batch(inputs, targets, weights)


def halve(batch: Batch) -> tuple[Batch, Batch] | None:
    """The upper and the lower rows, each as narrow as it can be; None for a single row."""
    rows = len(batch.inputs)
    if rows == 1:
        return None
    return _narrow(batch, slice(0, rows // 2)), _narrow(batch, slice(rows // 2, rows))


def _narrow(batch: Batch, rows: slice) -> Batch:
    """What stands after the last supervised position of all rows changes nothing, and goes."""
    used = np.flatnonzero((batch.weights[rows] > 0).any(axis=0))  # positions
    end = min(width(int(used[-1]) + 1) if used.size else WIDTHS, batch.inputs.shape[1])
    return Batch(batch.inputs[rows, :end], batch.targets[rows, :end], batch.weights[rows, :end])
