"""Prefixes that several rows share, in MLX: each is computed once, with its gradient.

Their keys and values are handed to the rows in the shape of mlx-lm's caches, but with gradients.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from backends.interface import Batch, IntArray

Pair = tuple[mx.array, mx.array]  # keys and values [B, Hk, S, d]


class Recorded(Exception):
    """Leaves the forward pass: the keys and values that were wanted are there."""


class Recorder:
    """Takes down a block's keys and values, after what `before` makes of them."""

    def __init__(self, before: Any = None, leave: bool = False) -> None:
        self.offset = 0 if before is None else before.offset
        self.pair: Pair | None = None
        self._before, self._leave = before, leave

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        self.pair = (keys, values) if self._before is None else self._before.update_and_fetch(keys, values)
        if self._leave:
            raise Recorded
        return self.pair

    def make_mask(self, size: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        if return_array or (window_size and size > window_size):
            mask: mx.array = create_causal_mask(size, window_size=window_size)
            return mask
        return None if size == 1 else "causal"


class Past:
    """One block's keys and values of `lengths` [B] tokens before each row, in the first places of `pair` [B, ..].

    Where all rows have as many, `offset` is a plain number, which every architecture understands.
    """

    def __init__(self, pair: Pair, lengths: list[int]) -> None:
        self._pair = pair
        self._lengths = mx.array(lengths)
        self.offset = lengths[0] if len(set(lengths)) == 1 else self._lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        before, also = self._pair
        return mx.concatenate([before, keys], axis=2), mx.concatenate([also, values], axis=2)

    def make_mask(self, size: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[B, 1, size, S + size]: of what came before as much as there is, and own keys up to the query's."""
        lengths, own, before = self._lengths[:, None, None, None], mx.arange(size), mx.arange(self._pair[0].shape[2])
        queries = lengths + own[:, None]
        places = mx.concatenate([mx.broadcast_to(before, (*lengths.shape[:3], before.size)), lengths + own], axis=-1)
        there = mx.concatenate([before < lengths, mx.broadcast_to(own >= 0, (*lengths.shape[:3], size))], axis=-1)
        mask: mx.array = there & (places <= queries)
        return mask & (queries < places + window_size) if window_size else mask


class Whole:
    """A block's keys and values are all there; queries stand at `offset` [B] and after."""

    def __init__(self, pair: Pair, offset: mx.array) -> None:
        self._pair, self.offset = pair, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        return self._pair


def caches_of(model: nn.Module, batch: Batch) -> list[Any] | None:
    """For each block the keys and values of what stands before the batch's rows; None where nothing does."""
    if not batch.prefixes:
        return None
    recorders = [Recorder(leave=block is model.layers[-1]) for block in model.layers]
    with suppress(Recorded):  # what the last block makes of a prefix nobody needs
        model(mx.array(_padded(batch.prefixes)), cache=recorders)
    lengths = [len(batch.prefixes[prefix]) for prefix in batch.prefix_of]
    return [Past(_for_rows(recorder, batch), lengths) for recorder in recorders]


def keeps_keys_and_values(model: nn.Module) -> bool:
    """Whether keys and values are all that later tokens see of earlier ones."""
    caches = make_prompt_cache(model)
    return len(caches) == len(model.layers) and all(type(cache) in (KVCache, RotatingKVCache) for cache in caches)


def _for_rows(recorder: Recorder, batch: Batch) -> tuple[mx.array, mx.array]:
    """[B, Hk, longest prefix, d] of each row's own prefix."""
    if recorder.pair is None:
        raise TypeError("a block has no keys and values")
    keys, values = recorder.pair
    if len(batch.prefixes) == 1:  # a broadcast's gradient is a sum, which is cheaper than a gather's
        rows = len(batch.prefix_of)
        return mx.broadcast_to(keys, (rows, *keys.shape[1:])), mx.broadcast_to(values, (rows, *values.shape[1:]))
    own = mx.array(batch.prefix_of)
    return keys[own], values[own]


def _padded(rows: tuple[IntArray, ...]) -> IntArray:
    """[k, longest], padded on the right."""
    whole = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(whole, rows, strict=True):
        place[: len(row)] = row
    return whole
