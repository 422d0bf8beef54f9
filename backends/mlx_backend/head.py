"""From hidden states to losses and scores in MLX: only chosen positions reach the output head, a few at a time.

Logits of all positions, [N, vocab], never exist whole, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from backends.interface import FloatArray, IntArray
from backends.mlx_backend.patch import subclassed
from backends.mlx_backend.trainable import Place


class Head:
    """The model's forward pass in two parts: its body (embedding and blocks), and what follows position by position.

    What follows (the output layer, and in some architectures a scale or a softcap) is run by the model itself, with
    given hidden states in the place of its body's own. If the model has no body of its own, hidden states are logits.
    """

    def __init__(self, model: nn.Module, logits_at_once: int) -> None:
        """`logits_at_once`: how many logits make up a chunk; in float32, some ten such arrays exist at a time."""
        self._model, self._logits_at_once = model, logits_at_once
        self._recording = False
        self._recorded: mx.array | None = None  # what the body returned
        self._given: mx.array | None = None  # what the body is to return instead
        self._vocabulary = 0
        self.classes: mx.array | None = None  # [D, K] a classification head's weight, in the place of what follows
        self.trained: Sequence[Place] = ()  # the weights that the head reads, where they train
        self.apart = False  # whether the last forward pass stopped at the body
        for module in model.modules():
            if module is not model and _is_body(module, model.layers):
                subclassed(module, self._run_body)

    def find_trained(self, places: Sequence[Place]) -> None:
        """From here on the loss is differentiable by those of these weights that the head reads: it may share one
        with the embedding.
        """
        hidden = self.hidden(mx.array([[1]]), mx.array([0]))
        if self.apart:
            before = self.logits(hidden)
            self.trained = [place for place in places if not mx.array_equal(before, self._doubled(place, hidden))]

    def _doubled(self, weight: Place, hidden: mx.array) -> mx.array:
        """The logits with twice this weight."""
        value = weight.value
        weight.put(2 * value)
        try:
            return self.logits(hidden)
        finally:
            weight.put(value)

    def states(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """[B, T, D] of `inputs` [B, T]; `logits` takes them."""
        self._recording, self._recorded = True, None
        try:
            logits = self._model(inputs, cache=cache)
        finally:
            self._recording, recorded, self._recorded = False, self._recorded, None
        self.apart = recorded is not None
        states: mx.array = logits if recorded is None else recorded
        return states

    def hidden(self, inputs: mx.array, positions: mx.array, cache: list[Any] | None = None) -> mx.array:
        """[N, D] at the flat `positions` [N] of `inputs` [B, T]."""
        states = self.states(inputs, cache)
        return states.reshape(-1, states.shape[-1])[positions]

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 [N, vocab] of hidden states [N, D]."""
        logits = hidden
        if self.classes is not None:
            logits = hidden.astype(mx.float32) @ self.classes
        elif self.apart:
            self._given = hidden[None]
            try:
                logits = self._model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]
            finally:
                self._given = None
        self._vocabulary = logits.shape[-1]
        return logits.astype(mx.float32)

    def loss(self, hidden: mx.array, targets: IntArray, shares: FloatArray) -> mx.array:
        """sum(share x nll), differentiable by `hidden` [N, D], and by a classification head's weight.

        Each chunk's gradient is computed with its loss, while its logits exist.
        """
        if self.classes is not None:  # so few logits that they may exist at once
            return weighted_nll(self.logits(hidden), targets, shares)[0]

        @mx.custom_function
        def loss(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
            losses: list[mx.array] = []
            grads: list[mx.array] = []
            of_weights: list[mx.array] = []
            for rows in self._chunks(hidden):
                # one chunk after another: logits of several would need memory at once
                done = [*losses[-1:], *grads[-1:], *of_weights]
                chunk = mx.depends(hidden[rows], done) if done else hidden[rows]
                chunk_loss, (grad, *more) = self._chunk_loss([chunk, *weights], targets[rows], shares[rows])
                losses.append(chunk_loss)
                grads.append(grad)
                of_weights = [a + b for a, b in zip(of_weights, more, strict=True)] if of_weights else more
            return mx.stack(losses).sum(), mx.concatenate(grads), *of_weights

        @loss.vjp
        def backward(_inputs: Any, grad_outputs: Any, outputs: Any) -> Any:
            grads = [grad_outputs[0] * grad for grad in outputs[1:]]
            return tuple(grads) if self.trained else grads[0]

        outputs: Any = loss(hidden, *(place.value for place in self.trained))
        total: mx.array = outputs[0]
        return total

    def score(self, hidden: mx.array, targets: IntArray) -> tuple[FloatArray, IntArray]:
        """log p(target) and the most probable token, of hidden states [N, D]. [N] each"""
        logprob, greedy = np.zeros(len(targets), np.float32), np.zeros(len(targets), np.int32)
        mx.eval(hidden)
        for rows in self._chunks(hidden):
            logits = self.logits(hidden[rows])
            of_target = mx.take_along_axis(logits, mx.array(targets[rows])[:, None], axis=-1)[:, 0]
            logprob[rows] = np.array(of_target - mx.logsumexp(logits, axis=-1))
            greedy[rows] = np.array(mx.argmax(logits, axis=-1))
        return logprob, greedy

    def _chunk_loss(
        self, inputs: list[mx.array], targets: IntArray, shares: FloatArray
    ) -> tuple[mx.array, list[mx.array]]:
        """The loss of a chunk, and its gradients by the inputs: hidden states [n, D], and the weights of `trained`."""

        @mx.custom_function
        def nll(logits: mx.array) -> Any:
            return weighted_nll(logits, targets, shares)

        @nll.vjp
        def backward(_logits: mx.array, _grad_outputs: Any, outputs: Any) -> mx.array:
            grad_logits: mx.array = outputs[1]  # the loss itself is what is differentiated: its own gradient is 1
            return grad_logits

        def loss(inputs: list[mx.array]) -> mx.array:
            hidden, *weights = inputs
            with self._with(weights):
                found: Any = nll(self.logits(hidden))
            total: mx.array = found[0]
            return total

        loss_and_grads: tuple[mx.array, list[mx.array]] = mx.value_and_grad(loss)(inputs)
        return loss_and_grads

    @contextmanager
    def _with(self, weights: Sequence[mx.array]) -> Iterator[None]:
        """In here the head reads these weights."""
        before = [place.value for place in self.trained]
        for place, weight in zip(self.trained, weights, strict=True):
            place.put(weight)
        try:
            yield
        finally:
            for place, weight in zip(self.trained, before, strict=True):
                place.put(weight)

    def _chunks(self, hidden: mx.array) -> Iterator[slice]:
        """Rows of `hidden` [N, D] whose logits may exist at once."""
        if not self._vocabulary:
            self.logits(hidden[:1])  # for its shape
        rows = max(self._logits_at_once // self._vocabulary, 1)
        return (slice(start, start + rows) for start in range(0, hidden.shape[0], rows))

    def _run_body(self, base: Any, body: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the body's own call."""
        if self._given is not None:
            return self._given
        states = base(body, *args, **kwargs)
        if not self._recording or not isinstance(states, mx.array):
            return states
        self._recorded = states
        return states[:, :0]  # no position reaches the head


def weighted_nll(logits: mx.array, targets: IntArray, shares: FloatArray) -> tuple[mx.array, mx.array]:
    """sum(share x -log p(target)) of float32 `logits` [n, vocab], and its gradient by the logits."""
    index, share = mx.array(targets)[:, None], mx.array(shares)[:, None]
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    loss = (share * (normaliser - mx.take_along_axis(logits, index, axis=-1))).sum()
    grad = share * mx.exp(logits - normaliser)  # share x (softmax - one hot)
    at_target = mx.take_along_axis(grad, index, axis=-1) - share
    return loss, mx.put_along_axis(grad, index, at_target, axis=-1)


def _is_body(module: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether this module itself runs the model's blocks."""
    layers = module.get("layers")
    return isinstance(layers, list) and any(block is blocks[0] for block in layers)
