"""From hidden states to the loss in MLX: only chosen positions reach the output head, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from backends.mlx_backend.patch import subclassed


class _Reached(Exception):
    """The blocks are done: leaves the forward pass with their hidden states."""

    def __init__(self, hidden: mx.array) -> None:
        self.hidden = hidden


class Head:
    """The model's forward pass in two parts: the blocks, and all that follows them position by position.

    What follows (the output layer, and in some architectures a scale or a softcap) is run by the model itself, given
    hidden states in the place of its blocks' own.
    """

    def __init__(self, model: nn.Module, at_once: int) -> None:
        """So many logits, in float32, make up a chunk; some ten of them may be under way at once."""
        self._model, self._at_once = model, at_once
        self._asked = False
        self._given: mx.array | None = None
        self._apart = False
        self._vocabulary = 0
        for module in model.modules():
            if module is not model and _holds(module, model.layers):
                self._watch(module)

    def hidden(self, inputs: mx.array, positions: mx.array, cache: list[Any] | None = None) -> mx.array:
        """[N, D] at the flat `positions` [N] of `inputs` [B, T]; `logits` takes them."""
        self._asked = True
        try:
            found = self._model(inputs, cache=cache)
            self._apart = False  # an architecture that was not recognised: its logits, which `logits` passes on
        except _Reached as reached:
            found, self._apart = reached.hidden, True
        finally:
            self._asked = False
        chosen: mx.array = found.reshape(-1, found.shape[-1])[positions]
        return chosen

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 [N, vocab] of hidden states [N, D]."""
        logits = hidden
        if self._apart:
            self._given = hidden[None]
            try:
                logits = self._model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]
            finally:
                self._given = None
        self._vocabulary = logits.shape[-1]
        return logits.astype(mx.float32)

    def chunks(self, hidden: mx.array) -> Iterator[slice]:
        """Rows of `hidden` [N, D] whose logits may exist at once."""
        if not self._vocabulary:
            self.logits(hidden[:1])  # never evaluated
        rows = max(self._at_once // self._vocabulary, 1)
        return (slice(start, start + rows) for start in range(0, hidden.shape[0], rows))

    def _watch(self, backbone: nn.Module) -> None:
        def call(base: Any, this: Any, *args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                return self._given
            hidden = base(this, *args, **kwargs)
            if self._asked and isinstance(hidden, mx.array):
                raise _Reached(hidden)
            return hidden

        subclassed(backbone, call)


def _holds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    own = module.get("layers")
    return isinstance(own, list) and any(block is blocks[0] for block in own)
