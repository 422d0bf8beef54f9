"""Frozen blocks below the first adapter in MLX, computed once per row and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from backends.interface import Batch, IntArray
from backends.kept_states import Activations, Passing
from backends.mlx_backend.patch import subclassed
from backends.mlx_backend.streamed import Streamed
from backends.streaming import Advance, rows_of


class FrozenBlocks:
    """Forward passes that begin at the first adapted block, with what the blocks before it once made of each row.

    Of a streamed model many rows go through a block before the next one is read, each still alone: the same numbers.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[mx.array], object], count: int, streamed: Streamed | None = None
    ) -> None:
        """`run` is the model's forward pass over inputs [B, T]; its first `count` blocks are frozen."""
        self._run, self._count, self._streamed = run, count, streamed
        self._given: tuple[int, mx.array] | None = None  # the block that is given these states, and none before it runs
        self._wanted: int | None = None  # the block whose input is recorded: it does not run, and none after it
        self._recorded: mx.array | None = None
        for number, block in enumerate(model.layers):
            subclassed(block, partial(self._run_block, number))
        token = mx.zeros((1, 1), mx.int32)  # of a streamed model its first part alone computes states of it
        sample = self._entering(0, token) if streamed else self._computed(np.zeros(1, np.int32))  # [1, D]
        self._dtype = sample.dtype
        self.kept = Activations(sample.shape[1], _as_numpy(sample).dtype, blocks=count)

    @contextmanager
    def replaced_by(self, states: mx.array) -> Iterator[None]:
        """In here a forward pass gives its first adapted block these states [B, T, D], and runs no block before it."""
        with self._giving(self._count, states):
            yield

    def states(self, batch: Batch) -> mx.array:
        """[B, T, D]; 0 after a row's last supervised position, where nothing is asked of it. Each row has one."""
        for _ in self.read_ahead([batch]):  # of a streamed model: what is not kept yet
            pass
        states = np.zeros((*batch.inputs.shape, self.kept.width), self.kept.dtype)
        for row, tokens, weights in zip(states, batch.inputs, batch.weights, strict=True):
            end = int(np.flatnonzero(weights)[-1]) + 1
            if not self.kept.get(tokens[:end], row[:end]):
                row[:end] = _as_numpy(self._computed(tokens[:end]))  # alone: the same whatever stands beside it
                self.kept.put(tokens[:end], row[:end])
        return mx.array(states).view(self._dtype)

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        """As `Streams.read_ahead`."""
        rows = self.kept.lacking(row for batch in batches for row in rows_of(batch)) if self._streamed else []
        if not rows:
            return
        with self.kept.passing(rows) as passing:
            for part in range(self._count + 1):
                self._pass(part, passing)
                yield part + 1, self._count + 1

    def _pass(self, part: int, passing: Passing) -> None:
        """All rows through one part of a streamed model, which is read once."""
        assert self._streamed
        with self._streamed.held(part):
            for row, tokens in enumerate(passing.rows):
                ids = mx.array(tokens)[None]
                if part:
                    with self._giving(part - 1, mx.array(passing.get(row)).view(self._dtype)[None]):
                        passing.put(row, _as_numpy(self._entering(part, ids)))
                else:
                    passing.put(row, _as_numpy(self._entering(0, ids)))

    def _computed(self, tokens: IntArray) -> mx.array:
        """[n] -> [n, D]"""
        return self._entering(self._count, mx.array(tokens)[None])

    def _entering(self, block: int, ids: mx.array) -> mx.array:
        """What a row's block is given. [1, n] -> [n, D]"""
        self._wanted = block
        try:
            self._run(ids)
        finally:
            self._wanted, recorded, self._recorded = None, self._recorded, None
        if recorded is None:
            raise TypeError("the model does not run its blocks")
        return recorded[0]

    @contextmanager
    def _giving(self, block: int, states: mx.array) -> Iterator[None]:
        """In here the block is given these states [B, T, D], and nothing before it is computed."""
        self._given = block, states
        if self._streamed:
            self._streamed.unread = True
        try:
            yield
        finally:
            self._given = None
            if self._streamed:
                self._streamed.unread = False

    def _run_block(
        self, number: int, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._given is not None and number < self._given[0]:
            return x
        if self._wanted is not None and number >= self._wanted:
            self._recorded = x if number == self._wanted else self._recorded
            return x
        given = self._given is not None and number == self._given[0]
        return base(block, self._given[1] if given and self._given else x, *args, **kwargs)


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks come before the first in which something trains."""
    trained = [bool(tree_flatten(block.trainable_parameters())) for block in model.layers]
    return trained.index(True)


def _as_numpy(states: mx.array) -> NDArray[Any]:
    """bfloat16, which numpy does not have, as uint16."""
    return np.asarray(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)
