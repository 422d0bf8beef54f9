"""The gated delta rule in chunks, with its gradient: the recurrence of Qwen3.5's and other models' linear attention.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}' k_t)',   o_t = S_t' q_t         S [Dk, Dv], a = exp(decay)

Inside a chunk of C tokens the corrections u_t = b_t (v_t - ..) solve a triangular system, so that all but the state at
the beginning of each chunk is matrix products (Yang et al., 2024, "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length" and "Gated Delta Networks"). With X = (1 + L)^-1, L_ij = b_i D_ij k_i'k_j below the diagonal
and D_ij = a_{j+1} .. a_i:

    U = X diag(b) (V - diag(start) K S),   O = diag(start) Q S + (Q K' * D) U,   S' = start_C S + (diag(end) K)' U

Only the inputs, and the state of every 256 tokens, are kept for the gradient, which computes the rest again. All in
float32 and in plain operations, so that it runs wherever MLX does; products go to numpy where MLX's are slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

from backends.mlx_backend.blas_bridge import product
from backends.mlx_backend.delta_chunks import (
    Chunks,
    chunked,
    in_chunks,
    lower,
    of_key_heads,
    ours,
    theirs,
    token_parts,
    transposed,
    unchunked,
    unit_inverse,
)
from backends.mlx_backend.patch import rebound

_FEW = 8  # below so many tokens the loop over them is as fast


class DeltaRule:
    """In the place of mlx-lm's `gated_delta_update` in one model.

    Left to mlx-lm: single tokens, decays that differ within a head, and its Metal kernel, which has no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.used = self.serve(model)

    def serve(self, model: nn.Module) -> bool:
        """Whether any of the model's modules calls it from here on."""
        return rebound(model, "gated_delta_update", gated_delta.gated_delta_update, self)

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **more: Any,
    ) -> tuple[mx.array, mx.array]:
        """What is read [B, T, Hv, Dv] and the last state [B, Hv, Dv, Dk], as mlx-lm has them."""
        kernel = more.get("use_kernel", True) and mx.metal.is_available() and mx.default_device() == mx.gpu
        if kernel or q.shape[1] < _FEW or a.ndim != 3 or more.get("lower_bound") is not None:
            result: tuple[mx.array, mx.array] = gated_delta.gated_delta_update(
                q, k, v, a, b, A_log, dt_bias, state, mask, **more
            )
            return result
        beta = mx.sigmoid(b) * (2.0 if more.get("allow_neg_eigval") else 1.0)
        decay = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias)
        if mask is not None:
            beta, decay = (mx.where(mask[..., None], x, 0.0) for x in (beta, decay))
        if state is None:
            state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[-1]), mx.float32)
        return delta_rule(q, k, v, decay, beta, state)


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """What is read at each token [B, T, Hv, Dv], and the last state; differentiable by all that it is given.

    q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], decay and beta [B, T, Hv]; state [B, Hv, Dv, Dk] before the first token, in
    mlx-lm's layout. The state's type is float32; a token whose beta and decay are 0 leaves it as it is.
    """

    @mx.custom_function
    def recurrence(*inputs: mx.array) -> list[mx.array]:
        return _forward(*inputs)

    @recurrence.vjp
    def backward(inputs: Any, grad_outputs: Any, outputs: Any) -> list[mx.array]:
        return _backward(inputs, outputs[2:], grad_outputs[0], grad_outputs[1])

    outputs: Any = recurrence(q, k, v, decay, beta, state)
    return outputs[0], outputs[1]


def _forward(*inputs: mx.array) -> list[mx.array]:
    """Output and last state as `delta_rule` gives them, and the states [B, H, R, Dk, Dv] at each part's beginning."""
    q, k, v, decay, beta, first = inputs
    state, outs, states = ours(first, k.shape[2]), [], []
    for part in token_parts(k):
        chunks = chunked(q, k, v, decay, beta, part, after=[state])
        states.append(state)
        out, state = _run(chunks, _Solved.of(chunks), state)
        outs.append(unchunked(out, part))
    joined = mx.concatenate(outs, axis=1).astype(q.dtype)
    return [joined, theirs(state), *states]


def _backward(
    inputs: Sequence[mx.array], states: Sequence[mx.array], grad_out: mx.array, grad_last: mx.array
) -> list[mx.array]:
    """The gradients by the six inputs; the last part of the tokens first."""
    q, k, v, decay, beta, first = inputs
    grad_state, grads = ours(grad_last, k.shape[2]), []
    for part, state in reversed(list(zip(token_parts(k), states, strict=True))):
        chunks = chunked(q, k, v, decay, beta, part, after=[grad_state])
        grad = in_chunks(grad_out[:, part], k.shape[2], len(chunks.decay[0, 0, 0, 0]))
        by_inputs, grad_state = _run_backward(chunks, state, grad, grad_state)
        grads.append([unchunked(by_input, part) for by_input in by_inputs])
    whole = [mx.concatenate(list(parts), axis=1) for parts in zip(*reversed(grads), strict=True)]
    shaped = [grad.reshape(x.shape).astype(x.dtype) for grad, x in zip(whole, inputs[:5], strict=True)]
    return [*shaped, theirs(grad_state).astype(first.dtype)]


class _Solved(NamedTuple):
    """What of some chunks does not depend on the state before them."""

    between: mx.array  # D [B, H, R, N, C, C]: what remains at token i of what was written at j; 0 above the diagonal
    start: mx.array  # [B, H, R, N, C, 1] what remains at each token of the state before the chunk
    end: mx.array  # [B, H, R, N, C, 1] what remains after the chunk of what was written at each token
    keys: mx.array  # K K' [B, H, 1, N, C, C]
    inverse: mx.array  # X [B, H, R, N, C, C]
    reads: mx.array  # Q K' * D [B, H, R, N, C, C]
    alone: mx.array  # U of a state of 0 [B, H, R, N, C, Dv]
    old: mx.array  # what U loses to the state: W [B, H, R, N, C, Dk], so that U = alone - W S

    @classmethod
    def of(cls, chunks: Chunks) -> _Solved:
        q, k, v, decay, beta = chunks
        size = decay.shape[-1]
        below = lower(size, -1)
        # sums over the tokens between, and no differences of sums, which would lose what is small beside large ones
        between = mx.exp(mx.cumsum(mx.where(below, decay[..., None], 0.0), axis=-2)) * lower(size, 0)
        start = mx.exp(mx.cumsum(decay, axis=-1))[..., None]
        across, column = transposed(k), beta[..., None]
        keys = product(k, across)
        inverse = unit_inverse(column * (keys * between * below))
        alone, old = product(inverse, column * v), product(inverse, column * start * k)
        reads = product(q, across) * between
        return cls(between, start, between[..., -1, :, None], keys, inverse, reads, alone, old)


def _run(chunks: Chunks, solved: _Solved, state: mx.array) -> tuple[mx.array, mx.array]:
    """Output [B, H, R, N, C, Dv], and the state [B, H, R, Dk, Dv] after the last chunk."""
    states, corrections, state = _states(chunks, solved, state)
    return solved.start * product(chunks.q, states) + product(solved.reads, corrections), state


def _states(chunks: Chunks, solved: _Solved, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The state before each chunk [B, H, R, N, Dk, Dv], U [B, H, R, N, C, Dv], and the state after the last chunk."""
    written = transposed(solved.end * chunks.k)
    states, corrections = [], []
    for n in range(chunks.v.shape[3]):
        states.append(state)
        corrections.append(solved.alone[..., n, :, :] - product(solved.old[..., n, :, :], state))
        state = solved.start[..., n, -1:, :] * state + product(written[..., n, :, :], corrections[-1])
    return mx.stack(states, axis=3), mx.stack(corrections, axis=3), state


def _run_backward(
    chunks: Chunks, state: mx.array, grad_out: mx.array, grad_last: mx.array
) -> tuple[list[mx.array], mx.array]:
    """The gradients by q, k, v, decay and beta as `Chunks` has them, and by the state before the first chunk."""
    q, k, v, decay, beta = chunks
    solved = _Solved.of(chunks)
    states, corrections, _ = _states(chunks, solved, state)
    grads = _grad_states(solved, solved.end * k, solved.start * q, grad_out, grad_last)
    grad_us, grad_states, grad_state = grads
    # by what each formula above multiplies
    below, states_turned = lower(decay.shape[-1], -1), transposed(states)
    grad_reads = product(grad_out, transposed(corrections)) * solved.between
    grad_read = solved.start * product(grad_out, states_turned)  # by q, of what it reads of the state
    grad_written = solved.end * product(corrections, transposed(grad_states))  # by k, of what it writes
    grad_old = -product(grad_us, states_turned)
    column, turned = beta[..., None], transposed(solved.inverse)
    grad_right, grad_right_old = product(turned, grad_us), product(turned, grad_old)
    # (1 + L) U = right: the gradient by L is -(gradient by right) (solution)'
    grad_solved = product(grad_right, transposed(solved.alone)) + product(grad_right_old, transposed(solved.old))
    grad_system = -grad_solved * below
    plain = solved.keys * solved.between * below
    grad_keys = column * grad_system * solved.between
    grad_old_keys = column * solved.start * grad_right_old
    by_q = of_key_heads(product(grad_reads, k) + grad_read)
    by_keys = product(grad_keys + transposed(grad_keys), k) + product(transposed(grad_reads), q)
    by_k = of_key_heads(by_keys + grad_written + grad_old_keys)
    by_beta = (grad_system * plain).sum(-1) + (grad_right * v).sum(-1) + (grad_right_old * (solved.start * k)).sum(-1)
    of_between = grad_reads * product(q, transposed(k)) + grad_keys * solved.keys
    of_end = (grad_written * k).sum(-1)
    of_start = (grad_read * q + grad_old_keys * k).sum(-1)
    remaining = solved.start[..., -1, 0] * (grad_states * states).sum((-1, -2))
    by_decay = _by_decay(of_between, of_end, of_start, remaining)
    return [by_q, by_k, column * grad_right, by_decay, by_beta], grad_state


def _grad_states(
    solved: _Solved, written: mx.array, reading: mx.array, grad_out: mx.array, grad_state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradients by U, by the state after each chunk [B, H, R, N, Dk, Dv], and by the state before the first."""
    by_reads = product(transposed(solved.reads), grad_out)
    by_reading = product(transposed(reading), grad_out)
    lost = transposed(solved.old)
    grad_us, grad_states = [], []
    for n in reversed(range(grad_out.shape[3])):
        grad_states.append(grad_state)
        grad_us.append(by_reads[..., n, :, :] + product(written[..., n, :, :], grad_state))
        kept = solved.start[..., n, -1:, :] * grad_state
        grad_state = kept + by_reading[..., n, :, :] - product(lost[..., n, :, :], grad_us[-1])
    return mx.stack(grad_us[::-1], axis=3), mx.stack(grad_states[::-1], axis=3), grad_state


def _by_decay(of_between: mx.array, of_end: mx.array, of_start: mx.array, remaining: mx.array) -> mx.array:
    """The gradient by each decay, from those by the logarithms of `_Solved.between`, `end`, `start` and start_C.

    A token's decay is in D_ij where j < token <= i.
    """
    size = of_between.shape[-1]
    last = (mx.arange(size) == size - 1)[:, None]
    of_between = of_between + last * of_end[..., None, :]
    from_here = mx.cumsum(of_between, axis=-2, reverse=True) * lower(size, -1)
    of_start = of_start + last[:, 0] * remaining[..., None]
    return from_here.sum(-1) + mx.cumsum(of_start, axis=-1, reverse=True)
