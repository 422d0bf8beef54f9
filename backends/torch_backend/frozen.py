"""Frozen blocks below the adapter: computed once per row, and left out of a pass where their result is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from backends.interface import Batch, IntArray
from backends.kept_states import Activations
from backends.torch_backend.patch import blocks_of, forward_as


class FrozenBlocks:
    """A forward pass that begins at the first adapted block.

    Each row's frozen part is computed alone, so that its numbers do not depend on the rows it first came with.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        blocks, first = blocks_of(model)
        self._body, self._device = model.base_model, device
        self._frozen, self._first_adapted, self._above = list(blocks)[:first], blocks[first], list(blocks)[first + 1 :]
        sample = self._computed(np.zeros(1, np.int32))  # [1, D]
        self._like, self.kept = sample, Activations(sample.shape[1], _array(sample).dtype, blocks=first)

    @contextmanager
    def left_out(self, batch: Batch) -> Iterator[None]:
        """In here a pass over the batch begins at the first adapted block, with the states that enter it."""
        entering, forward = self._entering(batch).to(self._device), self._first_adapted.forward

        def enter(_: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            return forward(entering, *arguments, **named)

        with _passing(self._frozen), forward_as(self._first_adapted, enter):
            yield

    def _entering(self, batch: Batch) -> torch.Tensor:
        """[B, T, D]; zero after a row's last supervised position, where nothing is needed of it."""
        states = self._like.new_zeros(*batch.inputs.shape, self.kept.width)
        for row, tokens, weights in zip(states, batch.inputs, batch.weights, strict=True):
            supervised = np.flatnonzero(weights)
            length = supervised[-1] + 1 if supervised.size else 1
            row[:length] = self._row(np.ascontiguousarray(tokens[:length]))
        return states

    def _row(self, tokens: IntArray) -> torch.Tensor:
        """[n] -> [n, D] on the CPU, from the file or, the first time, from the frozen blocks."""
        row = self._like.new_empty(len(tokens), self.kept.width)
        if not self.kept.get(tokens, _array(row)):
            row = self._computed(tokens)
            self.kept.put(tokens, _array(row))
        return row

    def _computed(self, tokens: IntArray) -> torch.Tensor:
        """What enters the first adapted block; from there on the pass goes through blocks that do nothing."""
        entering: list[torch.Tensor] = []

        def note(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            entering.append(states)
            return states

        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.no_grad(), forward_as(self._first_adapted, note), _passing(self._above):
            self._body(input_ids=ids, use_cache=False)
        return entering[0][0].cpu().contiguous()


@contextmanager
def _passing(blocks: list[Any]) -> Iterator[None]:
    """In here the blocks pass on what they are given."""

    def same(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states

    with ExitStack() as replaced:
        for block in blocks:
            replaced.enter_context(forward_as(block, same))
        yield


def _array(row: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory for numpy, which has no bfloat16."""
    array: np.ndarray[Any, np.dtype[Any]] = (row.view(torch.uint16) if row.dtype == torch.bfloat16 else row).numpy()
    return array
