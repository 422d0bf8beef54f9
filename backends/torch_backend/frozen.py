"""Frozen blocks below the adapter left out, where what they make of a row is known already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from backends.interface import Batch, IntArray
from backends.kept_states import Activations
from backends.torch_backend.patch import blocks_of, forward_as


class _Reached(Exception):  # it is no error, and carries what was asked for
    """The first adapted block was reached, with these hidden states."""


class KeptPrefix:
    """A forward pass that begins at the first adapted block.

    Each row's frozen part is computed alone, so that its numbers do not depend on the rows it first came with.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        blocks, first = blocks_of(model)
        self._body, self._device = model.base_model, device
        self._frozen, self._adapted = list(blocks)[:first], blocks[first]
        sample = self._computed(np.zeros(1, np.int32))  # [1, D]
        self._like, self._kept = sample, Activations(sample.shape[1], _array(sample).dtype)

    @contextmanager
    def skipping(self, batch: Batch) -> Iterator[None]:
        """In here a pass over the batch begins at the first adapted block, with what was kept."""
        entering, own = self._entering(batch).to(self._device), self._adapted.forward
        with ExitStack() as replaced:
            for block in self._frozen:
                replaced.enter_context(forward_as(block, _passing))
            replaced.enter_context(forward_as(self._adapted, lambda _, *rest, **named: own(entering, *rest, **named)))
            yield

    def _entering(self, batch: Batch) -> torch.Tensor:
        """[B, T, D]; zero after a row's last supervised position, where nothing is asked of it."""
        rows: list[torch.Tensor] = []
        for tokens, weights in zip(batch.inputs, batch.weights, strict=True):
            needed = np.flatnonzero(weights)
            rows.append(self._row(np.ascontiguousarray(tokens[: needed[-1] + 1 if needed.size else 1])))
        whole = self._like.new_zeros(*batch.inputs.shape, self._kept.width)
        for place, row in zip(whole, rows, strict=True):
            place[: len(row)] = row
        return whole

    def _row(self, tokens: IntArray) -> torch.Tensor:
        """[n] -> [n, D] on the CPU, from the file or, the first time, from the frozen blocks."""
        row = self._like.new_empty(len(tokens), self._kept.width)
        if not self._kept.get(tokens, _array(row)):
            row = self._computed(tokens)
            self._kept.put(tokens, _array(row))
        return row

    def _computed(self, tokens: IntArray) -> torch.Tensor:
        def stop(states: torch.Tensor, *_: Any, **__: Any) -> None:
            raise _Reached(states)

        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.no_grad(), forward_as(self._adapted, stop):
            try:
                self._body(input_ids=ids, use_cache=False)
            except _Reached as reached:
                states: torch.Tensor = reached.args[0]
                return states[0].cpu().contiguous()
        raise RuntimeError("the model's blocks were never reached")


def _passing(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return states


def _array(row: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory for numpy, which has no bfloat16."""
    array: np.ndarray[Any, np.dtype[Any]] = (row.view(torch.uint16) if row.dtype == torch.bfloat16 else row).numpy()
    return array
