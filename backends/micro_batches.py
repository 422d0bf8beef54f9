"""A micro-batch in smaller parts, where memory is dear and small products are no slower than large ones.

And one whose rows share prefixes, as one without: for sessions that cannot share, and for tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch, Scores

# What is computed at a time, from which a run's memory is foretold too. Tokens on a CPU, where more are no faster and
# need more memory; and logits, a number for each position and token of the vocabulary: more on MLX's GPUs, which are
# slow where they read the head for few positions.
CPU_TOKENS = {"torch": 1024, "mlx": 512}
LOGITS = {("torch", "cpu"): 2**23, ("torch", "gpu"): 2**23, ("mlx", "cpu"): 2**22, ("mlx", "gpu"): 2**24}

Rows = NDArray[np.int64]


def parts(batch: Batch, tokens: int) -> Iterator[tuple[Rows, Batch]]:
    """The rows in which anything is supervised, the longest first, so many tokens at a time: (rows, their batch).

    What stands after a row's last supervised position changes nothing, and goes where the whole part allows. A row
    longer than `tokens` is alone.
    """
    ends = batch.inputs.shape[1] - np.argmax(batch.weights[:, ::-1] != 0, axis=1)  # one past the last supervised
    order = np.argsort(-ends, kind="stable")
    waiting = order[(batch.weights[order] != 0).any(axis=1)]
    while waiting.size:
        width = int(ends[waiting[0]])
        rows, waiting = np.split(waiting, [max(tokens // width, 1)])
        prefix_of = tuple(batch.prefix_of[row] for row in rows) if batch.prefixes else ()
        inputs, targets = batch.inputs[rows, :width], batch.targets[rows, :width]
        yield rows, Batch(inputs, targets, batch.weights[rows, :width], batch.prefixes, prefix_of)


def joined(batch: Batch) -> Batch:
    """The same rows with every prefix written out before them. [B, longest prefix + T]"""
    if not batch.prefixes:
        return batch
    starts = _starts(batch)
    rows, width = batch.inputs.shape
    shape = (rows, max(starts) + width)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, start in enumerate(starts):
        prefix = batch.prefixes[batch.prefix_of[row]]
        own = slice(start, start + width)
        inputs[row, :start], inputs[row, own] = prefix, batch.inputs[row]
        targets[row, :start] = [*prefix[1:], batch.inputs[row, 0]]
        targets[row, own], weights[row, own] = batch.targets[row], batch.weights[row]
    return Batch(inputs, targets, weights)


def own_part(scores: Scores, batch: Batch) -> Scores:
    """Of the scores of `joined(batch)`, those of the batch's own positions. [B, T]"""
    if not batch.prefixes:
        return scores
    places = np.array(_starts(batch))[:, None] + np.arange(batch.inputs.shape[1])  # [B, T]
    return Scores(np.take_along_axis(scores.logprob, places, 1), np.take_along_axis(scores.greedy, places, 1))


def _starts(batch: Batch) -> list[int]:
    """How many tokens stand before each row. [B]"""
    return [len(batch.prefixes[prefix]) for prefix in batch.prefix_of]
