"""One forward pass, up to the hidden states that the head then turns into losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from backends.interface import BackendError, Batch, IntArray
from backends.loss_scale import OUTGROWN
from backends.micro_batches import joined
from backends.streaming import Advance
from backends.torch_backend.device import uploaded
from backends.torch_backend.frozen import FrozenBlocks
from backends.torch_backend.head import class_head, find_head
from backends.torch_backend.joined_attention import join_prefixes
from backends.torch_backend.own_code import agree
from backends.torch_backend.patch import blocks_of, one_sequence_per_row
from backends.torch_backend.prefix import SharedPrefixes, attends_to_all
from backends.torch_backend.streamed import Streamed


class Forward:
    """The model's blocks, and its head beside them."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        logits_at_once: int,
        score: torch.nn.Parameter | None = None,
        streamed: Streamed | None = None,
    ) -> None:
        """score: the weight of a classification head in the place of the model's own. streamed: where `model` is."""
        self._model, self._device, self._streamed = model, device, streamed
        self.head = find_head(model, logits_at_once) if score is None else class_head(model, score, logits_at_once)
        self._selected: torch.Tensor | None = None  # [N] flat positions, during a pass that ends in logits
        self.frozen: FrozenBlocks | None = None
        self._join = False  # attention to a prefix and to a row's own tokens
        if self.head.linear is None:  # every pass ends in logits
            model.get_output_embeddings().register_forward_pre_hook(self._select)

    def states(self, batch: Batch, prefixes: SharedPrefixes | None = None) -> torch.Tensor:
        """What `head` makes logits of, at the supervised positions in their order. [N, D]

        Rows are padded on the right and attention is causal, so no supervised position sees padding.
        Where the batch has prefixes, `prefixes` is `self.prefixes(batch.prefixes)`.
        """
        ids, selected = uploaded([batch.inputs.astype(np.int64), np.flatnonzero(batch.weights)], self._device)
        return self.uploaded_states(batch, ids, selected, prefixes)

    def uploaded_states(
        self, batch: Batch, ids: torch.Tensor, selected: torch.Tensor, prefixes: SharedPrefixes | None
    ) -> torch.Tensor:
        """The same, with the batch's tokens [B, T] and the flat positions [N] that are supervised on the device."""
        arguments: dict[str, Any] = prefixes.arguments(batch) if prefixes else {"use_cache": False}
        with self.frozen.left_out(batch) if self.frozen else nullcontext():
            return self._states_at(selected, ids, arguments)

    def last_logits(self, tokens: IntArray, cache: Cache, ends: IntArray | None = None) -> torch.Tensor:
        """What may follow the cache and `tokens` [R, T] up to `ends` [R]; all are added to the cache. [R, V]"""
        rows, width = tokens.shape
        last = np.arange(rows) * width + (width - 1 if ends is None else ends)
        ids, selected = uploaded([tokens.astype(np.int64), last], self._device)
        return self.head.logits(self._states_at(selected, ids, {"past_key_values": cache, "use_cache": True}))

    def next_logits(
        self, tokens: IntArray, cache: Cache, visible: np.ndarray[Any, Any], columns: IntArray
    ) -> torch.Tensor:
        """The same after one more token [R] each, at `columns` [R] of its row; `visible` [R, S]: False for padding."""
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if not visible.all():
            arguments["attention_mask"] = torch.from_numpy(visible.astype(np.int64)).to(self._device)
            arguments["position_ids"] = torch.from_numpy(columns.astype(np.int64))[:, None].to(self._device)
        ids, selected = uploaded([tokens[:, None].astype(np.int64), np.arange(len(tokens))], self._device)
        return self.head.logits(self._states_at(selected, ids, arguments))

    def check_range(self) -> None:
        """Raises BackendError where the model's hidden states are too large for its type, float16."""
        ids = np.array([[1, 2, 3], [3, 1, 0]], np.int32)
        with torch.no_grad():
            if not self.states(Batch(ids, ids, np.ones(ids.shape, np.float32))).isfinite().all():
                raise BackendError(OUTGROWN)

    def attends_to_all(self) -> bool:
        return attends_to_all(self._model)

    def empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def prefixes(self, prefixes: Sequence[IntArray]) -> SharedPrefixes:
        return SharedPrefixes(self._model.base_model, prefixes, self._device, self._join)

    def can_share_prefixes(self) -> bool:
        """Whether rows that continue shared prefixes have the states that they have with their prefixes written out."""
        if self.frozen or not attends_to_all(self._model):
            return False
        inputs = np.array([[3, 2], [1, 3], [2, 1]], np.int32)
        prefixes = (np.array([1, 2], np.int32), np.array([3], np.int32))
        batch = Batch(inputs, inputs, np.ones(inputs.shape, np.float32), prefixes, (0, 1, 0))
        with torch.no_grad():
            shared = self._shares(batch)
            self._join = shared and join_prefixes(self._model)
            self._join = self._join and self._shares(replace(batch, prefixes=prefixes[:1], prefix_of=(0, 0, 0)))
        return shared

    def _shares(self, batch: Batch) -> bool:
        expected = self.states(joined(batch))
        return self._gives(expected, lambda: self.states(batch, self.prefixes(batch.prefixes)))

    def keep_frozen_blocks(self) -> bool:
        """From here on, the blocks below the adapter are computed once per row; False where that is not exact.

        Raises BackendError where that is not exact and the model is streamed.
        """
        if blocks_of(self._model)[1] == 0:
            return False
        ids = np.array([[1, 2, 3], [3, 1, 0]], np.int32)
        batch = Batch(ids, ids, np.ones(ids.shape, np.float32))
        with torch.no_grad():
            expected = self.states(batch)

            def kept() -> torch.Tensor:
                self.frozen = self.frozen or FrozenBlocks(self._model, self._device, self._streamed)
                return self.states(batch)

            same = all(self._gives(expected, kept) for _ in ("computed", "read back"))
        self.frozen = self.frozen if same else None
        if self._streamed and not same:
            raise self._streamed.refusal("what they make of a row is not all that the others need")
        return same

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        """As `Streams.read_ahead`."""
        return self.frozen.read_ahead(batches) if self.frozen else iter(())

    def _gives(self, expected: torch.Tensor, states: Callable[[], torch.Tensor]) -> bool:
        """Whether a shortcut gives these states. A model's own code may fail in many ways on what it did not expect."""
        try:
            return agree(states(), expected, self._model.dtype)
        except OSError:  # of the disk, where states are kept
            raise
        except Exception:
            return False

    def _states_at(self, selected: torch.Tensor, ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """What the head makes logits of, at flat positions [N] of the tokens [B, T]. [N, D]"""
        arguments["input_ids"] = ids
        with one_sequence_per_row():
            if self.head.linear is None:
                return self._logits_at(selected, arguments)
            hidden: torch.Tensor = self._model.base_model(**arguments).last_hidden_state
        return hidden.flatten(0, 1)[selected]

    def _logits_at(self, selected: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The model's own logits, where its head is more than `Head` knows. [N, V]"""
        self._selected = selected
        try:
            logits: torch.Tensor = self._model(**arguments).logits
        finally:
            self._selected = None
        return logits if logits.ndim == 2 else logits.flatten(0, 1)[selected]  # 3: the hook did not reach the head

    def _select(self, _head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """A hook before the output head: only the selected hidden states go on. [B, T, D] -> [N, D]"""
        if self._selected is None or not args:
            return None
        return (args[0].flatten(0, 1)[self._selected], *args[1:])
