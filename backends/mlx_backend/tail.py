"""The last block in MLX computed only where something is asked: elsewhere all that is needed are keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from backends.mlx_backend.patch import subclassed
from backends.mlx_backend.prefix import Recorded, Recorder, Whole

_SHARE = 2  # worth it where at most one position in so many is asked for


class Tail:
    """Within `of(weights)`, forward passes return the hidden states of a window of each row: [B, n, D]."""

    def __init__(self, model: nn.Module) -> None:
        self._starts: NDArray[np.int32] | None = None
        self._size = 0
        subclassed(model.layers[-1], self._call)

    @contextmanager
    def of(self, weights: NDArray[np.float32]) -> Iterator[NDArray[np.int64]]:
        """The flat places, in what the forward pass then returns, of the nonzero `weights` [B, T], in their order."""
        each, place = np.nonzero(weights)
        used = weights != 0
        width = weights.shape[1]
        first, end = used.argmax(axis=1), width - used[:, ::-1].argmax(axis=1)
        size = int((end - first).max())
        if size * _SHARE > width:
            yield np.flatnonzero(weights)
            return
        starts = np.maximum(end - size, 0).astype(np.int32)
        self._starts, self._size = starts, size
        try:
            yield each * size + place - starts[each]
        finally:
            self._starts = None

    def _call(self, base: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._starts is None:
            return base(block, *args, **kwargs)
        bound = inspect.signature(base).bind(block, *args, **kwargs)
        given = bound.arguments
        name = list(given)[1]  # after the block itself: the hidden states
        x, mask, cache = given[name], given["mask"], given.get("cache")
        recorder = Recorder(cache, leave=True)
        given["cache"] = recorder
        with suppress(Recorded):
            base(*bound.args, **bound.kwargs)
        pair = recorder.pair
        if pair is None:
            raise TypeError("the last block has no keys and values")
        places = mx.array(self._starts[:, None] + np.arange(self._size, dtype=np.int32))  # [B, n]
        given[name] = mx.take_along_axis(x, places[..., None], axis=1)
        given["mask"] = _rows_of_mask(mask, places, x.shape[1], pair[0].shape[2])
        given["cache"] = Whole(pair, recorder.offset + mx.array(self._starts))
        return base(*bound.args, **bound.kwargs)


def _rows_of_mask(mask: mx.array | str | None, places: mx.array, length: int, keys: int) -> mx.array:
    """bool [B, 1, n, S], of a mask for all `length` queries over S keys."""
    if mask is None:
        raise TypeError("attention that is not causal")
    if isinstance(mask, str):
        before = keys - length
        found: mx.array = (mx.arange(keys) <= before + places[..., None])[:, None]
        return found
    whole = mx.broadcast_to(mask, (places.shape[0], 1, length, keys))
    return mx.take_along_axis(whole, places[:, None, :, None], axis=2)
