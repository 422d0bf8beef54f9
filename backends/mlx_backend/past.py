"""Keys and values that a forward pass finds there already, in the shape of mlx-lm's caches but with gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

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
