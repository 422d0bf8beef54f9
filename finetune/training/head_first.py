"""Trains the classification head alone first, on hidden states computed once per row."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.interface import HEAD_WEIGHT, FloatArray, Session
from finetune.data.rows import Example
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_head import read_head, write_head
from finetune.errors import Diverged, Incompatible
from finetune.evaluation.scoring import row_states
from finetune.events import Event, Note
from finetune.training.job import Job

WHAT = "head: states"  # of the progress, and of the forecast
HEAD_ALONE = "; base: the head alone, on the frozen model"
RIDGE = 1e-6  # times the sum of squares: what keeps the head of rows that a plane parts finite

Reals = NDArray[np.float64]
Classes = NDArray[np.int64]


class Fitted(NamedTuple):
    weight: FloatArray  # [K, D]
    best: int  # the pass that it is of, from 0
    losses: tuple[float, ...]  # after each pass, nats per row: of the validation rows, or of the training rows without


def head_first(job: Job, session: Session, run: RunFolder) -> Generator[Event, None, Mapping[str, FloatArray] | None]:
    """The head that learned alone, which is in the session afterwards; None where the recipe has none.

    A resumed run takes the one that is kept. Raises Incompatible for a file that no run writes, Diverged where a state
    is not finite, MemoryExhausted.
    """
    if job.recipe.head is None:
        return None
    trained = session.trained()
    head = read_head(run)
    if head is None:
        weight = yield from _trained(job, session, job.recipe.head.first_epochs)
        write_head(run, weight)
        head = {HEAD_WEIGHT: weight}
    if head[HEAD_WEIGHT].shape != trained[HEAD_WEIGHT].shape:
        raise Incompatible(f"{run.head}: a head for other labels or another model; delete it")
    session.set_trained({**trained, **head})
    return head


def _trained(job: Job, session: Session, passes: int) -> Generator[Event, None, FloatArray]:
    began, tokens = time.perf_counter(), job.recipe.train.tokens_at_once
    untrained = session.trained()[HEAD_WEIGHT]
    if not passes:
        return untrained
    train, valid = job.prepared.train.examples, job.prepared.valid.examples
    read = yield from row_states(session, (*train, *valid), tokens, WHAT)  # one pass over all rows
    if not np.isfinite(read).all():
        raise Diverged("the model's states are not finite numbers, so no head can be trained; check its weights")
    computed = time.perf_counter()
    made = fit(read, classes_of((*train, *valid)), len(train), len(untrained), passes)
    yield Note(0, _head_note(made, len(read), computed - began, time.perf_counter() - computed))
    return made.weight


def _head_note(made: Fitted, rows: int, reading: float, fitting: float) -> str:
    return (
        f"head first: {rows:,} rows through the frozen model once, {reading:.1f} s; {len(made.losses) - 1} passes over "
        f"their states, {fitting:.1f} s; loss {made.losses[0]:.4f} before, {made.losses[made.best]:.4f} after pass "
        f"{made.best}, which is kept"
    )


def classes_of(examples: tuple[Example, ...]) -> Classes:
    """[n]"""
    return np.array([example.tokens[-1] for example in examples], np.int64)


def fit(states: FloatArray, classes: Classes, trained: int, count: int, passes: int) -> Fitted:
    """Multinomial logistic regression by L-BFGS (Liu & Nocedal, 1989), which needs no learning rate.

    states: [n, D], of which the first `trained` are learned from; the rest say which pass is kept. count: K. Each
    state's numbers are divided by their root mean square first, so that all are learned at one pace.
    """
    from scipy.optimize import minimize

    scale = np.sqrt(np.square(states[:trained], dtype=np.float64).mean(0)) + 1e-8  # [D]
    scaled = (states / scale).astype(np.float64)
    learned = scaled[:trained], classes[:trained]
    judged = (scaled[trained:], classes[trained:]) if trained < len(states) else learned
    shape = (count, states.shape[1])
    flat = np.zeros(count * states.shape[1])
    best, losses = (flat, 0), [_loss(flat.reshape(shape), *judged)[0]]

    def loss(weight: Reals) -> tuple[float, Reals]:
        value, grad = _loss(weight.reshape(shape), *learned)
        return value + RIDGE * float(weight @ weight), (grad.ravel() + 2 * RIDGE * weight)

    def look(weight: Reals) -> None:
        nonlocal best
        losses.append(_loss(weight.reshape(shape), *judged)[0])
        if losses[-1] < losses[best[1]]:
            best = weight.copy(), len(losses) - 1

    minimize(loss, flat, jac=True, method="L-BFGS-B", callback=look, options={"maxiter": passes, "maxfun": passes + 1})
    return Fitted((best[0].reshape(shape) / scale).astype(np.float32), best[1], tuple(losses))


def _loss(weight: Reals, states: Reals, classes: Classes) -> tuple[float, Reals]:
    """The mean of -log p(class), and its gradient by the weight. [K, D]"""
    logits = states @ weight.T  # [n, K]
    logits -= logits.max(-1, keepdims=True)
    shares = np.exp(logits)
    total = shares.sum(-1, keepdims=True)
    rows = np.arange(len(classes))
    nll = np.log(total[:, 0]) - logits[rows, classes]
    shares /= total
    shares[rows, classes] -= 1  # softmax - one hot
    grad: Reals = shares.T @ states / len(classes)
    return float(nll.mean()), grad
