"""Frozen blocks in MLX whose results are kept: below the first adapter, each row is computed once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from backends.interface import Batch, IntArray
from backends.kept_states import Activations
from backends.mlx_backend.patch import subclassed


class FrozenBlocks:
    """Forward passes that begin at the first adapted block, with what the blocks before it once made of each row."""

    def __init__(self, model: nn.Module, run: Callable[[mx.array], object], count: int) -> None:
        """`run` is the model's forward pass over inputs [B, T]; its first `count` blocks are frozen."""
        self._run = run
        self._entering: mx.array | None = None  # what the first adapted block is given instead of its input
        self._recording = False
        self._recorded: mx.array | None = None  # the input of the first adapted block
        for block in model.layers[:count]:
            subclassed(block, self._run_frozen)
        subclassed(model.layers[count], self._run_first)
        for block in model.layers[count + 1 :]:
            subclassed(block, self._run_later)
        sample = self._computed(np.zeros(1, np.int32))  # [1, D]
        self._dtype = sample.dtype
        self.kept = Activations(sample.shape[1], _as_numpy(sample).dtype, blocks=count)

    @contextmanager
    def replaced_by(self, states: mx.array) -> Iterator[None]:
        """In here a forward pass gives its first adapted block these states [B, T, D], and runs no block before it."""
        self._entering = states
        try:
            yield
        finally:
            self._entering = None

    def states(self, batch: Batch) -> mx.array:
        """[B, T, D]; 0 after a row's last supervised position, where nothing is asked of it. Each row has one."""
        states = np.zeros((*batch.inputs.shape, self.kept.width), self.kept.dtype)
        for row, tokens, weights in zip(states, batch.inputs, batch.weights, strict=True):
            end = int(np.flatnonzero(weights)[-1]) + 1
            if not self.kept.get(tokens[:end], row[:end]):
                row[:end] = _as_numpy(self._computed(tokens[:end]))  # alone: the same whatever stands beside it
                self.kept.put(tokens[:end], row[:end])
        return mx.array(states).view(self._dtype)

    def _computed(self, tokens: IntArray) -> mx.array:
        """[n] -> [n, D]"""
        self._recording = True
        try:
            self._run(mx.array(tokens)[None])
        finally:
            self._recording, recorded, self._recorded = False, self._recorded, None
        if recorded is None:
            raise TypeError("the model does not run its blocks")
        return recorded[0]

    def _run_frozen(self, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return base(block, x, *args, **kwargs) if self._entering is None else x

    def _run_first(self, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._recording:
            self._recorded = x
            return x
        return base(block, x if self._entering is None else self._entering, *args, **kwargs)

    def _run_later(self, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if self._recording else base(block, x, *args, **kwargs)


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks come before the first in which something trains."""
    trained = [bool(tree_flatten(block.trainable_parameters())) for block in model.layers]
    return trained.index(True)


def _as_numpy(states: mx.array) -> NDArray[Any]:
    """bfloat16, which numpy does not have, as uint16."""
    return np.asarray(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)
