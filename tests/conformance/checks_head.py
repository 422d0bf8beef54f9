"""Promises of a session with a classification head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backends.interface import HEAD_WEIGHT, BackendError, Batch, OptimSpec
from backends.micro_batches import joined
from tests.conformance.toy import (
    DROPPING,
    LORA,
    OPTIM,
    Case,
    begun,
    close,
    identical,
    padded,
    part,
    prefixed,
    toy_batch,
)

CLASSES = 3
HEADED = replace(LORA, classes=CLASSES)
LR = 1e-2


def classes_of(batch: Batch) -> Batch:
    """The same rows, each with a class after its last supervised token, which alone is supervised."""
    chosen = batch.weights != 0
    last = batch.inputs.shape[1] - 1 - np.argmax(chosen[:, ::-1], axis=1)  # [B]
    weights = np.zeros_like(batch.weights)
    rows = np.flatnonzero(chosen.any(axis=1))
    weights[rows, last[rows]] = [1.0, 0.5, 1.0, 1.0, 0.5][: len(rows)]
    return replace(batch, targets=np.where(weights > 0, batch.inputs % CLASSES, batch.targets), weights=weights)


BATCH, OTHER = classes_of(toy_batch()), classes_of(toy_batch(seed=1))


def check_a_head_starts_at_chance(case: Case) -> None:
    session = case.open(lora=HEADED)
    state = session.get_state()
    assert list(state.adapter)[-1] == HEAD_WEIGHT and state.adapter[HEAD_WEIGHT].shape == (CLASSES, 64)
    assert session.step([BATCH], LR).loss == pytest.approx(np.log(CLASSES), rel=1e-6)
    assert session.get_state().adapter[HEAD_WEIGHT].any()


def check_scores_are_the_heads_of_the_states(case: Case) -> None:
    session = begun(case, lora=HEADED)
    for batch in (BATCH, classes_of(prefixed())):
        chosen = batch.weights != 0
        logits = session.states(batch) @ session.get_state().adapter[HEAD_WEIGHT].T  # [N, K]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores = session.score(batch)
        np.testing.assert_array_equal(scores.greedy[chosen], logits.argmax(-1))
        expected = logs[np.arange(len(logs)), batch.targets[chosen]]
        np.testing.assert_allclose(scores.logprob[chosen], expected, atol=2e-5)
        assert not scores.logprob[~chosen].any()


def check_states_are_of_the_row_alone(case: Case) -> None:
    """However rows are padded, cut or joined with their prefix; and the adapter is in them."""
    session = begun(case, lora=HEADED)
    expected = session.states(BATCH)
    assert expected.dtype == np.float32 and expected.shape == (5, 64)
    wide = padded(replace(BATCH, rows=()), 3)
    np.testing.assert_allclose(session.states(wide), expected, atol=2e-5)
    np.testing.assert_allclose(session.states(part(BATCH, 3, 1)), expected[[3, 1]], atol=2e-5)
    batch = classes_of(prefixed())
    np.testing.assert_allclose(session.states(batch), session.states(joined(batch)), atol=2e-5)
    assert np.abs(case.open(lora=HEADED).states(BATCH) - expected).max() > 1e-3


def check_the_heads_gradient_is_that_of_its_loss(case: Case) -> None:
    session = begun(case, lora=HEADED, optim=OptimSpec(betas=(0.0, 0.0), clip_norm=None))
    states, chosen = session.states(BATCH), BATCH.weights != 0
    logits = states @ session.get_state().adapter[HEAD_WEIGHT].T
    wrong = np.exp(logits - logits.max(-1, keepdims=True))
    wrong /= wrong.sum(-1, keepdims=True)  # softmax - one hot
    wrong[np.arange(len(wrong)), BATCH.targets[chosen]] -= 1
    share = BATCH.weights[chosen] / BATCH.weights.sum()
    session.step([BATCH], 0.0)
    found = session.get_state().moments[f"{HEAD_WEIGHT}.exp_avg"]
    expected = (wrong * share[:, None]).T @ states
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def check_a_head_and_its_adapter_learn_the_same_however_rows_are_cut(case: Case) -> None:
    lora = replace(DROPPING, classes=CLASSES)
    whole, split = begun(case, lora=lora), begun(case, lora=lora)
    ours, theirs = whole.step([BATCH], LR), split.step([part(BATCH, 4, 3), part(BATCH, 2), part(BATCH, 1, 0)], LR)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5) and theirs.tokens == ours.tokens == 5
    close(split.get_state(), whole.get_state(), 1e-4)
    again = begun(case, lora=lora)
    again.set_state(whole.get_state())
    whole.step([OTHER], LR), again.step([OTHER], LR)
    identical(again.get_state(), whole.get_state())


def check_a_head_learns(case: Case) -> None:
    session = case.open(lora=HEADED, optim=OPTIM)
    losses = [session.step([BATCH], LR).loss for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def check_a_head_refuses_what_it_cannot_do(case: Case) -> None:
    session, plain = begun(case, lora=HEADED), begun(case)
    before = session.get_state()
    wrong = replace(BATCH, targets=np.where(BATCH.weights > 0, CLASSES, BATCH.targets))
    for call in (session.score, session.states, lambda batch: session.step([batch], LR)):
        with pytest.raises(ValueError, match=f"class {CLASSES}"):
            call(wrong)
    with pytest.raises(BackendError, match="writes no text"):
        session.generate([[1]], 3, ())
    with pytest.raises(BackendError, match="no classification head"):
        plain.states(BATCH)
    identical(session.get_state(), before)
