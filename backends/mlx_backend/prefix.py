"""Prefixes that several rows share, in MLX: each is computed once, with its gradient."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from backends.interface import Batch, IntArray
from backends.mlx_backend.past import Past, Recorded, Recorder


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
