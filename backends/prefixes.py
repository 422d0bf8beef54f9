"""Batches whose rows share prefixes, as batches without: for sessions that cannot share, and for tests."""

from __future__ import annotations

import numpy as np

from backends.interface import Batch, Scores


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
