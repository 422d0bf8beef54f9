"""Forward passes of a model with adapters in MLX, for training and for scoring."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import BackendError, Batch, FloatArray, Scores
from backends.loss_scale import OUTGROWN
from backends.micro_batches import (
    Positions,
    Rows,
    few_prefixes,
    in_row_order,
    joined,
    parts,
    places_of,
    prefix_places,
    widened,
)
from backends.mlx_backend.attention import TiledAttention
from backends.mlx_backend.costs import COSTS
from backends.mlx_backend.delta_rule import DeltaRule
from backends.mlx_backend.frozen import FrozenBlocks, frozen_blocks
from backends.mlx_backend.head import Head
from backends.mlx_backend.lora import Dropout
from backends.mlx_backend.model import check_window
from backends.mlx_backend.prefix import keeps_keys_and_values, prefix_caches
from backends.mlx_backend.streamed import Streamed
from backends.predictions import ATTENTION, DELTA_RULE, FROZEN_BLOCKS, HEAD, LORA, SHARED_PREFIXES
from backends.streaming import STREAMED, Advance

# What a shortcut is tried on: three rows, each supervised at other positions, after prefixes of unequal length.
_TOKENS = np.arange(1, 31, dtype=np.int32).reshape(3, 10)
_SAMPLE = Batch(_TOKENS, _TOKENS, np.eye(10, dtype=np.float32)[[7, 9, 4]] + np.eye(10, dtype=np.float32)[[6, 8, 4]])
_PREFIXED = replace(_SAMPLE, prefixes=(_TOKENS[1, :5], _TOKENS[0, :3]), prefix_of=(0, 1, 0))
# Of the largest number; what is wrong is off by far more.
_NEAR = {mx.float32: 1e-3, mx.bfloat16: 0.05, mx.float16: 0.01}
# What a model's own code raises where it is given a cache or blocks that it was not written for. A lack of memory is
# not among these.
_DOES_NOT_FIT = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError)


class Forward:
    """A model that runs the shortcuts which hold for it.

    `shortcuts` names them; `left_out` says of the others why not.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Dropout,
        on_cpu: bool,
        window: int | None,
        classes: int = 0,
        streamed: Streamed | None = None,
    ) -> None:
        """`window`: the tokens that a row may have, if there is a limit. `classes`: of a classification head.
        `streamed`: where `model` is.

        Raises BackendError where the model takes no such head, or its hidden states are too large for float16.
        """
        costs = COSTS["cpu" if on_cpu else "gpu"]
        self.model, self.window, self._masks = model, window, masks
        self._few_widths = costs.few_widths
        self._tokens_at_once = costs.tokens_at_once or sys.maxsize
        self.head = Head(model, costs.logits_at_once or sys.maxsize)
        self._attention = TiledAttention(model)
        self._delta_rule = DeltaRule(model)
        self.frozen: FrozenBlocks | None = None
        self._streamed = streamed
        if streamed:
            streamed.own_code += [self._attention.serve, self._delta_rule.serve]
        self.left_out: dict[str, str] = {}
        self.train(False)
        expected = self._hidden(_SAMPLE)
        if expected.dtype == mx.float16 and (self._cuts_off_states() or not mx.isfinite(expected).all()):
            raise BackendError(OUTGROWN)
        self._keep_frozen_blocks(expected)
        self.shares_prefixes = self._can_share_prefixes()
        if classes and not self.head.apart:
            raise BackendError("this model has no body of its own in mlx-lm, so it takes no classification head")
        if not self.head.apart:
            self.left_out[HEAD] = "the model has no module of its own for its blocks"
        if not self._attention.used:
            self.left_out[ATTENTION] = "the model does not call mlx-lm's attention"

    @property
    def shortcuts(self) -> tuple[str, ...]:
        every = (SHARED_PREFIXES, FROZEN_BLOCKS, HEAD, LORA, ATTENTION)
        delta_rule = (DELTA_RULE,) if self._delta_rule.used else ()
        streamed = (STREAMED,) if self._streamed else ()
        return (*(name for name in every if name not in self.left_out), *delta_rule, *streamed)

    def compute_at_once(self) -> None:
        """From here on attention is computed as it is reached, as the products around it are."""
        self._attention.at_once = True

    def train(self, on: bool) -> None:
        self.model.train(on)
        self._attention.training = on
        if not on:
            self._masks.off()

    def parts(self, batch: Batch) -> Iterator[tuple[Rows, Batch]]:
        """The rows with anything supervised in them, in as many batches as memory asks for."""
        longest = max(map(len, batch.prefixes), default=0)
        tokens = sys.maxsize if longest else self._tokens_at_once  # each part would compute the prefixes again
        for few, rows_of_few in few_prefixes(batch, self._tokens_at_once):
            for rows, part in parts(rows_of_few, tokens):
                check_window(longest + part.inputs.shape[1], self.window)
                yield few[rows], widened(part) if self._few_widths else part

    def entering(self, part: Batch) -> mx.array | None:
        """What the frozen blocks make of the part's rows [B, T, D]; None where all blocks are run.

        Not to be called while MLX traces.
        """
        if self.frozen is None:
            return None
        training = self.model.training
        self.train(False)  # the same arithmetic in training and evaluation: what is kept serves both
        try:
            return self.frozen.states(part)
        finally:
            self.train(training)

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        """As `Streams.read_ahead`."""
        return self.frozen.read_ahead(batches) if self.frozen else iter(())

    def loss(self, step: int, part: Batch, entering: mx.array | None, total: float) -> mx.array:
        """sum(weight x nll) / total, differentiable by the adapter's tensors; `entering` is `self.entering(part)`.

        Dropout is that of a step after `step` others, until it is switched off: what is computed again needs it, too.
        """
        supervised = np.flatnonzero(part.weights)
        shares = part.weights.flat[supervised] / np.float32(total)
        return self.head.loss(self._hidden(part, entering, step), part.targets.flat[supervised], shares)

    def scores(self, batch: Batch) -> Scores:
        logprob, greedy = np.zeros(batch.weights.shape, np.float32), np.zeros(batch.weights.shape, np.int32)
        for rows, part in self.parts(batch):
            row, column = np.nonzero(part.weights)
            scores = self.head.score(self._hidden(part, self.entering(part)), part.targets[row, column])
            logprob[rows[row], column], greedy[rows[row], column] = scores
        return Scores(logprob, greedy)

    def last_states(self, batch: Batch) -> FloatArray:
        """[N, D] of the supervised positions, row by row."""
        return in_row_order(batch, (self._states(rows, part) for rows, part in self.parts(batch)))

    def _states(self, rows: Rows, part: Batch) -> tuple[Positions, FloatArray]:
        """The supervised positions of a part in its batch, of which `rows` it has, and their last hidden states."""
        row, column = np.nonzero(part.weights)
        return (rows[row], column), np.array(self._hidden(part, self.entering(part)).astype(mx.float32))

    def _hidden(self, part: Batch, entering: mx.array | None = None, step: int | None = None) -> mx.array:
        """[N, D] of the supervised positions; `step`: of a training step after so many others."""
        if step is not None and part.prefixes:
            self._masks.at(step, prefix_places(part))
        caches = prefix_caches(self.head, len(self.model.layers), part)
        if step is not None:
            self._masks.at(step, places_of(part))
        replaced = self.frozen.replaced_by(entering) if self.frozen and entering is not None else nullcontext()
        with replaced:
            return self.head.hidden(mx.array(part.inputs), mx.array(np.flatnonzero(part.weights)), caches)

    def _cuts_off_states(self) -> bool:
        """Whether mlx-lm keeps this model's hidden states in float16 by cutting them off, as it does Gemma 3's."""
        modules = {kind.__module__ for kind in type(self.model.layers[-1]).__mro__}
        return any(hasattr(sys.modules[name], "clip_residual") for name in modules)

    def _keep_frozen_blocks(self, expected: mx.array) -> None:
        """From here on, what the frozen blocks make of a row is computed once, if the model can leave them out."""
        count = frozen_blocks(self.model)
        if not count:
            self.left_out[FROZEN_BLOCKS] = "every block has an adapter"
            return

        def computed_once() -> mx.array:
            self.frozen = FrozenBlocks(self.model, self.head.states, count, self._streamed)
            return self._hidden(_SAMPLE, self.entering(_SAMPLE))

        if self._agrees(FROZEN_BLOCKS, computed_once, expected):
            return
        self.frozen = None
        if self._streamed:
            raise self._streamed.refusal(self.left_out[FROZEN_BLOCKS])

    def _can_share_prefixes(self) -> bool:
        if self.frozen is not None:
            self.left_out[SHARED_PREFIXES] = "frozen blocks are computed once for each whole row"
        elif not keeps_keys_and_values(self.model):
            self.left_out[SHARED_PREFIXES] = "the model's blocks keep more than keys and values"
        else:
            return self._agrees(SHARED_PREFIXES, lambda: self._hidden(_PREFIXED), self._hidden(joined(_PREFIXED)))
        return False

    def _agrees(self, shortcut: str, compute: Callable[[], mx.array], expected: mx.array) -> bool:
        """Whether a shortcut comes to the hidden states that are `expected`; if not, `left_out` says why."""
        try:
            difference = float(mx.abs(compute() - expected).max() / mx.abs(expected).max())
        except _DOES_NOT_FIT as error:
            self.left_out[shortcut] = f"{type(error).__name__}: {error}"
            return False
        if not difference < _NEAR[expected.dtype]:
            self.left_out[shortcut] = f"hidden states would be off by {difference:.1e} of the largest"
            return False
        return True
