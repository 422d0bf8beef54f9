"""Scoring without training: log-probabilities of a batch's targets, and its last hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from backends.interface import Batch, FloatArray, Scores
from backends.micro_batches import Positions, in_row_order, joined, parts
from backends.torch_backend.device import uploaded
from backends.torch_backend.forward import Forward


def scores_of(forward: Forward, batch: Batch, tokens_at_once: int) -> Scores:
    """`Session.score`. The device computes some rows at a time."""
    logprob, greedy = np.zeros(batch.weights.shape, np.float32), np.zeros(batch.weights.shape, np.int32)
    for positions, states in _states(forward, batch, tokens_at_once):
        targets = uploaded([batch.targets[positions].astype(np.int64)], states.device)[0]
        part_logprob, part_greedy = forward.head.score(states, targets)
        logprob[positions], greedy[positions] = part_logprob.cpu().numpy(), part_greedy.cpu().numpy()
    return Scores(logprob, greedy)


def last_states(forward: Forward, batch: Batch, share: bool, tokens_at_once: int) -> FloatArray:
    """`Session.states`. share: whether prefixes are computed once."""
    whole = batch if share else joined(batch)
    pieces = _states(forward, whole, tokens_at_once)
    return in_row_order(whole, ((positions, states.float().cpu().numpy()) for positions, states in pieces))


def _states(forward: Forward, batch: Batch, tokens_at_once: int) -> Iterator[tuple[Positions, torch.Tensor]]:
    """The positions of some supervised tokens, and their last hidden states. [N, D]"""
    prefixes = forward.prefixes(batch.prefixes) if batch.prefixes else None
    for rows, part in parts(batch, tokens_at_once):
        row, column = np.nonzero(part.weights)
        yield (rows[row], column), forward.states(part, prefixes)
