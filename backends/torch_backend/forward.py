"""One forward pass, up to the hidden states that the head then turns into losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from backends.interface import Batch, IntArray
from backends.micro_batches import joined
from backends.torch_backend.frozen import KeptPrefix
from backends.torch_backend.head import find_head
from backends.torch_backend.patch import blocks_of
from backends.torch_backend.prefix import Start, attends_to_all
from backends.torch_backend.tail import Tail


class Forward:
    """The model's blocks, and its head beside them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device, self.head = model, device, find_head(model)
        self._selected: torch.Tensor | None = None  # [N] flat positions, during such a pass
        self._kept: KeptPrefix | None = None
        self._tail: Tail | None = None
        if self.head.linear is None:  # whole passes, head and all
            model.get_output_embeddings().register_forward_pre_hook(self._select)

    def states(self, batch: Batch, start: Start | None = None) -> torch.Tensor:
        """What `head` makes logits of, at the supervised positions in their order. [N, D]

        Rows are padded on the right and attention is causal, so no supervised position sees padding.
        Where the batch has prefixes, `start` is `self.start(batch.prefixes)`.
        """
        given: dict[str, Any] = start.arguments(batch) if start else {"use_cache": False}
        with ExitStack() as shortcuts:
            if self._kept:
                shortcuts.enter_context(self._kept.skipping(batch))
            short = shortcuts.enter_context(self._tail.of(batch.weights)) if self._tail else None
            return self._at(np.flatnonzero(batch.weights) if short is None else short, batch.inputs, given)

    def shorten_last_block(self) -> None:
        """From here on, the last block computes little but what is asked of it, if its architecture allows that."""
        tokens = np.array([[1, 2, 3, 1, 2, 0], [3, 1, 0, 2, 3, 1]], np.int32)
        weights = np.array([[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]], np.float32)
        batch = Batch(tokens, tokens, weights)
        with torch.no_grad():
            expected = self.states(batch)
            self._tail = Tail(self._model)
            try:
                same = self._close(self.states(batch), expected)
            except Exception:  # whatever a block makes of positions that are not all there
                same = False
        self._tail = self._tail if same else None

    def last_logits(self, tokens: IntArray, cache: Cache, ends: IntArray | None = None) -> torch.Tensor:
        """What may come after the cache and `tokens` [R, T] up to `ends` [R]; all are added to the cache. [R, V]"""
        rows, width = tokens.shape
        last = np.arange(rows) * width + (width - 1 if ends is None else ends)
        return self.head.logits(self._at(last, tokens, {"past_key_values": cache, "use_cache": True}))

    def next_logits(self, tokens: IntArray, cache: Cache, seen: np.ndarray[Any, Any], places: IntArray) -> torch.Tensor:
        """The same after one more token [R] each, at `places` [R] of its row; what is not `seen` [R, S] is padding."""
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if not seen.all():
            given["attention_mask"] = torch.from_numpy(seen.astype(np.int64)).to(self._device)
            given["position_ids"] = torch.from_numpy(places.astype(np.int64))[:, None].to(self._device)
        return self.head.logits(self._at(np.arange(len(tokens)), tokens[:, None], given))

    def attends_to_all(self) -> bool:
        return attends_to_all(self._model)

    def empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def _at(self, positions: np.ndarray[Any, Any], tokens: IntArray, given: dict[str, Any]) -> torch.Tensor:
        """What the head makes logits of, at flat positions [N]. [N, D]"""
        given["input_ids"] = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        selected = torch.from_numpy(positions).to(self._device)
        if self.head.linear is None:
            return self._own_logits(given, selected)
        hidden: torch.Tensor = self._model.base_model(**given).last_hidden_state
        return hidden.flatten(0, 1)[selected]

    def start(self, prefixes: Sequence[IntArray]) -> Start:
        return Start(self._model.base_model, prefixes, self._device)

    def can_share(self) -> bool:
        """Whether rows that go on from a `start` are what they are with their prefixes written out."""
        if self._kept or not attends_to_all(self._model):
            return False
        inputs = np.array([[3, 2], [1, 3], [2, 1]], np.int32)
        prefixes = (np.array([1, 2], np.int32), np.array([3], np.int32))
        batch = Batch(inputs, inputs, np.ones(inputs.shape, np.float32), prefixes, (0, 1, 0))
        with torch.no_grad():
            expected = self.states(joined(batch))
            try:
                return self._close(self.states(batch, self.start(prefixes)), expected)
            except Exception:  # whatever a model's forward makes of a cache that it did not fill itself
                return False

    def keep_frozen_blocks(self) -> None:
        """From here on, what the blocks below the adapter make of a row is computed once, if they can be left out."""
        if blocks_of(self._model)[1] == 0:
            return
        ids = np.array([[1, 2, 3], [3, 1, 0]], np.int32)
        batch = Batch(ids, ids, np.ones(ids.shape, np.float32))
        with torch.no_grad():
            expected = self.states(batch)
            try:
                self._kept = KeptPrefix(self._model, self._device)
                same = all(self._close(self.states(batch), expected) for _ in ("computed", "kept"))
            except Exception:  # whatever a model's forward makes of blocks that do nothing
                same = False
        self._kept = self._kept if same else None

    def _close(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        near = 5e-2 if self._model.dtype == torch.bfloat16 else 1e-4
        return bool((found - expected).float().norm() <= near * expected.float().norm())

    def _own_logits(self, given: dict[str, Any], selected: torch.Tensor) -> torch.Tensor:
        """The logits of an architecture whose head is more than `Head` knows. [N, V]"""
        self._selected = selected
        try:
            logits: torch.Tensor = self._model(**given).logits
        finally:
            self._selected = None
        return logits if logits.ndim == 2 else logits.flatten(0, 1)[selected]  # 3: the hook did not reach the head

    def _select(self, _head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the output head: keep the hidden states of supervised positions. [B, T, D] -> [N, D]"""
        if self._selected is None or not args:
            return None
        return (args[0].flatten(0, 1)[self._selected], *args[1:])
