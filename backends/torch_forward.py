"""One forward pass, up to the hidden states that the head then turns into losses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from backends.interface import Batch
from backends.torch_kept import KeptPrefix
from backends.torch_loss import find_head
from backends.torch_patch import blocks_of


class Forward:
    """The model's blocks, and its head beside them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device, self.head = model, device, find_head(model)
        self._selected: torch.Tensor | None = None  # [N] flat positions, during such a pass
        self._kept: KeptPrefix | None = None
        if self.head.linear is None:  # whole passes, head and all
            model.get_output_embeddings().register_forward_pre_hook(self._select)

    def states(self, batch: Batch, where: np.ndarray[Any, Any]) -> torch.Tensor:
        """What `head` makes logits of, at the flat positions `where`. [N, D]

        Rows are padded on the right and attention is causal, so no supervised position sees padding.
        """
        ids = torch.from_numpy(batch.inputs.astype(np.int64)).to(self._device)
        selected = torch.from_numpy(where).to(self._device)
        with self._kept.skipping(batch) if self._kept else nullcontext():
            if self.head.linear is None:
                return self._own_logits(ids, selected)
            hidden: torch.Tensor = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[selected]

    def keep_frozen_blocks(self) -> None:
        """From here on, what the blocks below the adapter make of a row is computed once, if they can be left out."""
        if blocks_of(self._model)[1] == 0:
            return
        ids, everything = np.array([[1, 2, 3], [3, 1, 0]], np.int32), np.ones((2, 3), np.float32)
        batch, where = Batch(ids, ids, everything), np.arange(6)
        with torch.no_grad():
            expected = self.states(batch, where).float()
            self._kept = KeptPrefix(self._model, self._device)
            try:
                passes = [self.states(batch, where).float() for _ in ("computed", "kept")]
            except Exception:  # whatever a model's forward makes of blocks that do nothing
                passes = []
        near = 3e-2 if self._model.dtype == torch.bfloat16 else 1e-4
        size = float(expected.abs().mean())
        if not passes or any((found - expected).abs().max() > near * size for found in passes):
            self._kept = None

    def _own_logits(self, ids: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """The logits of an architecture whose head is more than `Head` knows. [N, V]"""
        self._selected = selected
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._selected = None
        return logits if logits.ndim == 2 else logits.flatten(0, 1)[selected]  # 3: the hook did not reach the head

    def _select(self, _head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the output head: keep the hidden states of supervised positions. [B, T, D] -> [N, D]"""
        if self._selected is None or not args:
            return None
        return (args[0].flatten(0, 1)[self._selected], *args[1:])
