"""The loss of a step and its gradient, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backends.interface import Batch
from backends.micro_batches import by_prefixes, few_prefixes, joined, numbered, parts, places_of, prefix_places
from backends.torch_backend.device import uploaded
from backends.torch_backend.forward import Forward
from backends.torch_backend.masks import Dropout
from backends.torch_backend.prefix import SharedPrefixes


@dataclass(frozen=True)
class Gradient:
    """What a step's gradient is computed with. Nothing here waits for a GPU."""

    forward: Forward
    dropout: Dropout
    device: torch.device
    tokens_at_once: int

    def add(self, step: int, micro: Sequence[Batch], total: float, share: bool) -> torch.Tensor:
        """Adds the gradient of sum(w * nll) / total to every adapter tensor and returns that loss.

        step: those done before. share: whether prefixes are computed once.
        """
        loss = torch.zeros((), device=self.device)
        whole = (batch if share or not batch.prefixes else joined(batch) for batch in numbered(micro))
        rows = (few for batch in whole for _, few in few_prefixes(batch, self.tokens_at_once))
        try:
            for batches in by_prefixes(rows):
                prefixes = self._prefixes(step, batches[0])
                for part in (part for batch in batches for _, part in parts(batch, self.tokens_at_once)):
                    loss += self._of_part(step, part, prefixes, total)
                if prefixes:
                    prefixes.backward()
        finally:
            self.dropout.off()
        return loss

    def _prefixes(self, step: int, batch: Batch) -> SharedPrefixes | None:
        if not batch.prefixes:
            return None
        self.dropout.at(step, prefix_places(batch))
        return self.forward.prefixes(batch.prefixes)

    def _of_part(self, step: int, batch: Batch, prefixes: SharedPrefixes | None, total: float) -> torch.Tensor:
        self.dropout.at(step, places_of(batch))
        supervised, ids = np.flatnonzero(batch.weights), batch.inputs.astype(np.int64)
        targets = batch.targets.ravel()[supervised].astype(np.int64)
        shares = batch.weights.ravel()[supervised] / np.float32(total)
        # all of it before the first operation: later, a GPU would run dry while it is copied
        inputs = uploaded([ids, supervised, targets, shares], self.device)
        states = self.forward.uploaded_states(batch, inputs[0], inputs[1], prefixes)  # [N, D]
        loss, grad_states = self.forward.head.loss(states, *inputs[2:])
        states.backward(grad_states)
        return loss
