"""Shared prefixes in MLX: each computed once, with its gradient."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from backends.interface import Batch
from backends.micro_batches import padded_prefixes
from backends.mlx_backend.head import Head

Pair = tuple[mx.array, mx.array]  # keys and values [B, Hk, S, d]


def keeps_keys_and_values(model: nn.Module) -> bool:
    """Whether keys and values are all that later tokens see of earlier ones."""
    caches = make_prompt_cache(model)
    return len(caches) == len(model.layers) and all(type(cache) in (KVCache, RotatingKVCache) for cache in caches)


def prefix_caches(head: Head, blocks: int, batch: Batch) -> list[Any] | None:
    """For each block the keys and values of what stands before the batch's rows; None where nothing does."""
    if not batch.prefixes:
        return None
    recorders = [Recorder() for _ in range(blocks)]
    head.states(mx.array(padded_prefixes(batch.prefixes)), recorders)
    lengths = [len(batch.prefixes[prefix]) for prefix in batch.prefix_of]
    return [PrefixCache(_for_rows(recorder, batch), lengths) for recorder in recorders]


class Recorder:
    """Takes down a block's keys and values, in the shape of mlx-lm's caches."""

    def __init__(self) -> None:
        self.offset = 0
        self.pair: Pair | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        self.pair = keys, values
        return self.pair

    def make_mask(self, size: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        if return_array or (window_size and size > window_size):
            mask: mx.array = create_causal_mask(size, window_size=window_size)
            return mask
        return None if size == 1 else "causal"


class PrefixCache:
    """One block's keys and values before each row: `lengths` [B] tokens, in the first positions of `pair` [B, ..].

    In the shape of mlx-lm's caches, but with gradients. Where all rows have as many tokens before them, `offset` is
    a plain number, which every architecture understands.
    """

    def __init__(self, pair: Pair, lengths: list[int]) -> None:
        self.pair = pair
        self._lengths = mx.array(lengths)
        self.offset = lengths[0] if len(set(lengths)) == 1 else self._lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        prefix_keys, prefix_values = self.pair
        return mx.concatenate([prefix_keys, keys], axis=2), mx.concatenate([prefix_values, values], axis=2)

    def make_mask(self, size: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[B, 1, size, S + size]: all of the row's prefix, and its own keys up to the query's."""
        lengths, steps = self._lengths[:, None, None, None], mx.arange(size)
        columns = mx.arange(self.pair[0].shape[2])  # of the longest prefix
        query_positions = lengths + steps[:, None]
        prefix_positions = mx.broadcast_to(columns, (*lengths.shape[:3], columns.size))
        key_positions = mx.concatenate([prefix_positions, lengths + steps], axis=-1)
        own_keys = mx.ones((*lengths.shape[:3], size), mx.bool_)
        is_token = mx.concatenate([columns < lengths, own_keys], axis=-1)
        mask: mx.array = is_token & (key_positions <= query_positions)
        return mask & (query_positions < key_positions + window_size) if window_size else mask


def _for_rows(recorder: Recorder, batch: Batch) -> Pair:
    """[B, Hk, longest prefix, d] of each row's own prefix."""
    if recorder.pair is None:
        raise TypeError("a block has no keys and values")
    keys, values = recorder.pair
    if len(batch.prefixes) == 1:  # a broadcast's gradient is a sum, which is cheaper than a gather's
        rows = len(batch.prefix_of)
        return mx.broadcast_to(keys, (rows, *keys.shape[1:])), mx.broadcast_to(values, (rows, *values.shape[1:]))
    index = mx.array(batch.prefix_of)
    return keys[index], values[index]
