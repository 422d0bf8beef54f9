"""From hidden states to the loss in MLX: only chosen positions reach the output head, a few at a time.

[N, vocab] never exists whole, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import FloatArray, IntArray
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


def weighted_nll(logits: mx.array, targets: IntArray, shares: FloatArray) -> tuple[mx.array, mx.array]:
    """sum(share x -log p(target)) of float32 `logits` [n, vocab], and its slope by the logits."""
    index, share = mx.array(targets)[:, None], mx.array(shares)[:, None]
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    loss = (share * (normaliser - mx.take_along_axis(logits, index, axis=-1))).sum()
    slope = share * mx.exp(logits - normaliser)
    at_target = mx.take_along_axis(slope, index, axis=-1) - share
    return loss, mx.put_along_axis(slope, index, at_target, axis=-1)


class ChunkedLoss:
    """The loss of hidden states. Each chunk's slope is computed with its loss, while its logits are there."""

    def __init__(self, head: Head, nll: Callable[..., tuple[mx.array, mx.array]], at_once: bool) -> None:
        """`at_once`: what is computed is evaluated there and then, and must not be traced together."""
        self._head, self._nll, self._at_once = head, nll, at_once

    def __call__(self, hidden: mx.array, targets: IntArray, shares: FloatArray) -> mx.array:
        """sum(share x nll), differentiable by `hidden` [N, D]."""

        @mx.custom_function
        def loss(hidden: mx.array) -> tuple[mx.array, mx.array]:
            source = mx.array(np.asarray(hidden)) if self._at_once else hidden
            values: list[mx.array] = []
            slopes: list[mx.array] = []
            for rows in self._head.chunks(hidden):
                # one after another, not all at once
                part = mx.depends(source[rows], [values[-1], slopes[-1]]) if values else source[rows]
                value, slope = self._with_slope(part, targets[rows], shares[rows])
                values.append(value)
                slopes.append(slope)
            return mx.stack(values).sum(), mx.concatenate(slopes)

        @loss.vjp
        def backward(_hidden: mx.array, slopes: Any, outputs: Any) -> mx.array:
            below: mx.array = slopes[0] * outputs[1]
            return below

        found: Any = loss(hidden)
        total: mx.array = found[0]
        return total

    def _with_slope(self, hidden: mx.array, targets: IntArray, shares: FloatArray) -> tuple[mx.array, mx.array]:
        @mx.custom_function
        def nll(logits: mx.array) -> Any:
            return self._nll(logits, targets, shares)

        @nll.vjp
        def backward(_logits: mx.array, _slopes: Any, outputs: Any) -> mx.array:
            slope: mx.array = outputs[1]  # the loss itself is what is differentiated: its own slope is 1
            return slope

        loss: Any = nll
        found: tuple[mx.array, mx.array] = mx.value_and_grad(lambda part: loss(self._head.logits(part))[0])(hidden)
        return found

    def scores(self, hidden: mx.array, targets: IntArray) -> tuple[FloatArray, IntArray]:
        """log p(target) and the most probable token, of hidden states [N, D]. [N] each"""
        logprob, greedy = np.zeros(len(targets), np.float32), np.zeros(len(targets), np.int32)
        mx.eval(hidden)
        for rows in self._head.chunks(hidden):
            logits = self._head.logits(hidden[rows])
            picked = mx.take_along_axis(logits, mx.array(targets[rows])[:, None], axis=-1)[:, 0]
            logprob[rows] = np.array(picked - mx.logsumexp(logits, axis=-1))
            greedy[rows] = np.array(mx.argmax(logits, axis=-1))
        return logprob, greedy
