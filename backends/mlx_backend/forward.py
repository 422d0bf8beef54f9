"""How a model with adapters is run in MLX, to train and to score: no more of it than is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import Batch, Scores
from backends.micro_batches import Rows, joined, parts
from backends.mlx_backend import attention, cpu_kernels, head
from backends.mlx_backend.attention import Attention
from backends.mlx_backend.costs import COSTS
from backends.mlx_backend.cpu_layers import spare_first_slopes
from backends.mlx_backend.frozen import KeptBlocks, frozen_blocks
from backends.mlx_backend.head import ChunkedLoss, Head
from backends.mlx_backend.model import check_window
from backends.mlx_backend.prefix import caches_of, keeps_keys_and_values
from backends.mlx_backend.tail import Tail

# To find out with what holds for a model: three rows in which different places are asked for, after unlike prefixes.
_TOKENS = np.arange(1, 31, dtype=np.int32).reshape(3, 10)
_SAMPLE = Batch(_TOKENS, _TOKENS, np.eye(10, dtype=np.float32)[[7, 9, 4]] + np.eye(10, dtype=np.float32)[[6, 8, 4]])
_GOING_ON = replace(_SAMPLE, prefixes=(_TOKENS[1, :5], _TOKENS[0, :3]), prefix_of=(0, 1, 0))
_NEAR = {mx.float32: 1e-3, mx.bfloat16: 0.05}  # of the largest number; what is wrong is off by far more


class Forward:
    """`numpy`: by numpy also what lies between the products of a model changed by `use_blas`."""

    def __init__(self, model: nn.Module, on_cpu: bool, numpy: bool, checkpointing: bool) -> None:
        costs = COSTS["cpu" if on_cpu else "gpu"]
        self.model, self._tokens = model, costs.tokens_at_once or sys.maxsize
        self.head = Head(model, costs.logits_at_once or sys.maxsize)
        self._loss = ChunkedLoss(self.head, (cpu_kernels if numpy else head).weighted_nll, at_once=numpy)
        self._attention = Attention(model, (cpu_kernels if numpy else attention).attend, always=numpy)
        self._tail: Tail | None = None
        self._kept: KeptBlocks | None = None
        self.shares_prefixes = False
        self.window: int | None = None  # the longest row, where there is one
        self.train(False)
        if not checkpointing:  # a block that is computed again must be the same function of its arguments alone
            self._try_tail()
        self._try_kept()
        if numpy:
            spare_first_slopes(model, partial(self._hidden, _SAMPLE))
        if not checkpointing and self._kept is None and keeps_keys_and_values(model):
            self.shares_prefixes = self._same(_GOING_ON, self._hidden(joined(_GOING_ON)))

    def train(self, on: bool) -> None:
        self.model.train(on)
        self._attention.training = on

    def parts(self, batch: Batch) -> Iterator[tuple[Rows, Batch]]:
        """The rows with anything supervised in them, in as many batches as memory asks for."""
        before = max(map(len, batch.prefixes), default=0)
        for rows, part in parts(batch, sys.maxsize if before else self._tokens):  # prefixes are computed for each part
            check_window(before + part.inputs.shape[1], self.window)
            yield rows, part

    @contextmanager
    def prepared(self, part: Batch) -> Iterator[None]:
        """In here `part` is run; what is needed of frozen blocks is there, and not traced."""
        if self._kept is None:
            yield
            return
        training, self._attention.training = self._attention.training, False  # what is kept comes from one arithmetic
        with self._kept.given(part):
            self._attention.training = training
            yield

    def loss(self, part: Batch, total: float) -> mx.array:
        """sum(weight x nll) / total, differentiable by the adapter's tensors."""
        chosen = np.flatnonzero(part.weights)
        shares = part.weights.flat[chosen] / np.float32(total)
        return self._loss(self._hidden(part), part.targets.flat[chosen], shares)

    def scores(self, batch: Batch) -> Scores:
        logprob, greedy = np.zeros(batch.weights.shape, np.float32), np.zeros(batch.weights.shape, np.int32)
        for rows, part in self.parts(batch):
            with self.prepared(part):
                each, place = np.nonzero(part.weights)
                found = self._loss.scores(self._hidden(part), part.targets[each, place])
            logprob[rows[each], place], greedy[rows[each], place] = found
        return Scores(logprob, greedy)

    def _hidden(self, part: Batch) -> mx.array:
        """[N, D] of the supervised positions."""
        caches = caches_of(self.model, part)
        if self._tail is None:
            return self.head.hidden(mx.array(part.inputs), mx.array(np.flatnonzero(part.weights)), caches)
        with self._tail.of(part.weights) as places:
            return self.head.hidden(mx.array(part.inputs), mx.array(places), caches)

    def _try_tail(self) -> None:
        wanted, self._tail = self._hidden(_SAMPLE), Tail(self.model)
        if not self._same(_SAMPLE, wanted):
            self._tail = None

    def _try_kept(self) -> None:
        frozen = frozen_blocks(self.model)
        if frozen:
            wanted, self._kept = self._hidden(_SAMPLE), KeptBlocks(self.model, frozen)
            if not self._same(_SAMPLE, wanted):
                self._kept = None

    def _same(self, batch: Batch, wanted: mx.array) -> bool:
        """Whether a shorter way comes to the hidden states that are `wanted` in this architecture."""
        try:
            with self.prepared(batch):
                apart = mx.abs(self._hidden(batch) - wanted).max() / mx.abs(wanted).max()
            return float(apart) < _NEAR[wanted.dtype]
        except Exception:  # whatever a model's own code makes of a cache that it was not written for
            return False
