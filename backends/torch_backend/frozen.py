"""Frozen blocks below the adapter, computed once per row and skipped when their result is cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from backends.interface import Batch, IntArray
from backends.kept_states import Activations, Passing
from backends.streaming import Advance, rows_of
from backends.torch_backend.patch import blocks_of, forward_as
from backends.torch_backend.streamed import Streamed


class FrozenBlocks:
    """A forward pass that begins at the first adapted block.

    Each row's frozen part is computed alone, so that its numbers do not depend on the rows it first came with. Of a
    streamed model many rows go through a block before the next one is read, each still alone: the same numbers.
    """

    def __init__(self, model: Any, device: torch.device, streamed: Streamed | None = None) -> None:
        blocks, first = blocks_of(model)
        self._body, self._device, self._streamed, self._blocks = model.base_model, device, streamed, list(blocks)
        self._frozen, self._first_adapted = self._blocks[:first], self._blocks[first]
        sample = self._sample()  # [1, D]
        self._like, self.kept = sample, Activations(sample.shape[1], _array(sample).dtype, blocks=first)

    @contextmanager
    def left_out(self, batch: Batch) -> Iterator[None]:
        """In here a pass over the batch begins at the first adapted block, with the states that enter it."""
        entering, forward = self._entering(batch).to(self._device), self._first_adapted.forward

        def enter(_: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            return forward(entering, *arguments, **named)

        embedding = self._body.get_input_embeddings()
        unread = forward_as(embedding, lambda _: entering) if self._streamed else nullcontext()
        with _passing(self._frozen), forward_as(self._first_adapted, enter), unread:
            yield

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        """As `Streams.read_ahead`."""
        rows = self.kept.lacking(row for batch in batches for row in rows_of(batch)) if self._streamed else []
        if not rows:
            return
        with self.kept.passing(rows) as passing:
            for part in range(len(self._frozen) + 1):
                self._pass(part, passing)
                yield part + 1, len(self._frozen) + 1

    def _pass(self, part: int, passing: Passing) -> None:
        """All rows through one part of a streamed model, which is read once."""
        assert self._streamed
        with self._streamed.held(part):
            for row, tokens in enumerate(passing.rows):
                entering = self._tensor(passing.get(row)).to(self._device)[None] if part else None
                passing.put(row, _array(self._left(part, tokens, entering)))

    def _left(self, part: int, tokens: IntArray, entering: torch.Tensor | None) -> torch.Tensor:
        """What one part of a streamed model makes of a row's tokens, or of the states that enter it. [n, D]"""
        if entering is None:
            return self._entering_block(0, tokens, [])
        block, forward = self._blocks[part - 1], self._blocks[part - 1].forward

        def enter(_: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            return forward(entering, *arguments, **named)

        unread = forward_as(self._body.get_input_embeddings(), lambda _: entering)
        with unread, forward_as(block, enter):
            return self._entering_block(part, tokens, [block])

    def _tensor(self, states: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(states).view(self._like.dtype)

    def _entering(self, batch: Batch) -> torch.Tensor:
        """[B, T, D]; zero after a row's last supervised position, where nothing is needed of it."""
        for _ in self.read_ahead([batch]):  # of a streamed model: what is not kept yet
            pass
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
        """What enters the first adapted block. [n, D]"""
        return self._entering_block(len(self._frozen), tokens, self._frozen)

    def _entering_block(self, number: int, tokens: IntArray, before: list[Any]) -> torch.Tensor:
        """[n, D]; of the blocks only those in `before` compute anything."""
        entering: list[torch.Tensor] = []

        def note(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            entering.append(states)
            return states

        others = [block for block in self._blocks if block is not self._blocks[number] and block not in before]
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.no_grad(), forward_as(self._blocks[number], note), _passing(others):
            self._body(input_ids=ids, use_cache=False)
        return entering[0][0].cpu().contiguous()

    def _sample(self) -> torch.Tensor:
        """States of a token, for their width and type; a streamed model's first part alone computes them. [1, D]"""
        token = np.zeros(1, np.int32)
        return self._entering_block(0, token, []) if self._streamed else self._computed(token)


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
