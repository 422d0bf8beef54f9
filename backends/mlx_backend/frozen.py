"""Frozen blocks in MLX whose results are kept: below the first adapter, each row is computed once in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch, IntArray
from backends.kept_states import Activations
from backends.mlx_backend.lora import AdaptedLinear
from backends.mlx_backend.patch import subclassed


class _Entered(Exception):
    """The frozen blocks are done: leaves the forward pass with what the first adapted block is given."""

    def __init__(self, states: mx.array) -> None:
        self.states = states


class KeptBlocks:
    """Forward passes that begin at the first adapted block, with what the blocks before it once made of each row."""

    def __init__(self, model: nn.Module, frozen: int) -> None:
        self._model = model
        self._given: mx.array | None = None
        self._entering = False
        for block in model.layers[:frozen]:
            subclassed(block, self._pass_on)
        subclassed(model.layers[frozen], self._enter)
        self._dtype = mx.float32
        self._kept: Activations | None = None  # until the first row tells how wide states are

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """In here the model's forward pass is of this batch's inputs; every row has something supervised in it."""
        self._given = self._states(batch)
        try:
            yield
        finally:
            self._given = None

    def _pass_on(self, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return base(block, x, *args, **kwargs) if self._given is None else x

    def _enter(self, base: Callable[..., Any], block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._entering:
            raise _Entered(x)
        return base(block, x if self._given is None else self._given, *args, **kwargs)

    def _states(self, batch: Batch) -> mx.array:
        """[B, T, D]; 0 after a row's last supervised position, where nothing is asked of it."""
        if self._kept is None:
            sample = self._computed(batch.inputs[0, :1])
            self._dtype, self._kept = sample.dtype, Activations(sample.shape[1], _numpy(sample).dtype)
        states = np.zeros((*batch.inputs.shape, self._kept.width), self._kept.dtype)
        for place, tokens, weights in zip(states, batch.inputs, batch.weights, strict=True):
            end = int(np.flatnonzero(weights)[-1]) + 1
            if not self._kept.get(tokens[:end], place[:end]):
                place[:end] = _numpy(self._computed(tokens[:end]))  # alone: the same whatever stands beside it
                self._kept.put(tokens[:end], place[:end])
        return mx.array(states).view(self._dtype)

    def _computed(self, tokens: IntArray) -> mx.array:
        """[n] -> [n, D]"""
        self._entering = True
        try:
            self._model(mx.array(tokens)[None])
        except _Entered as entered:
            return entered.states[0]
        finally:
            self._entering = False
        raise TypeError("the model's blocks were never reached")


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks come before the first adapted one."""
    adapted = [any(isinstance(module, AdaptedLinear) for module in block.modules()) for block in model.layers]
    return adapted.index(True)


def _numpy(states: mx.array) -> NDArray[Any]:
    """What numpy has no type for goes as it lies in memory."""
    return np.asarray(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)
