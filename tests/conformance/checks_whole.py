"""Promises of a session in which the whole model trains, and no adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.interface import BackendError, IncompatibleState, LoraSpec, OptimSpec, Session, TrainState
from backends.micro_batches import joined
from tests.conformance.toy import (
    DROPPING,
    OPTIM,
    Case,
    begun,
    close,
    differ,
    identical,
    mean_nll,
    padded,
    part,
    prefixed,
    toy_batch,
)

WHOLE = LoraSpec(rank=1, alpha=1.0, whole=True)
LR = 1e-3
BATCH, OTHER = toy_batch(), toy_batch(seed=1)
GRADIENT = OptimSpec(betas=(0.0, 0.0), clip_norm=None)  # its moments are the last gradient, and its square


def opened(case: Case, optim: OptimSpec = OPTIM, **spec: Any) -> Session:
    """Skips where the weights are quantised, of which `check_quantised_weights_do_not_train` speaks."""
    if case.quantize != "none":
        pytest.skip("4-bit weights do not train")
    return case.open(lora=WHOLE, optim=optim, **spec)


def check_a_whole_model_starts_as_the_base(case: Case) -> None:
    """Whatever was trained before, `untrained` is where it began, with an adapter too."""
    session = opened(case)
    start = session.get_state()
    assert all(value.dtype == np.float32 and value.any() for value in start.adapter.values())
    identical(start, replace(start, adapter=session.untrained()))
    np.testing.assert_allclose(session.score(BATCH).logprob, case.open().score(BATCH).logprob, atol=2e-5)
    session.step([BATCH], LR)
    assert differ(start, session.get_state())
    identical(start, replace(start, adapter=session.untrained()))
    adapted = begun(case, lora=DROPPING)
    adapted.set_state(TrainState(0, adapted.untrained(), {}))
    np.testing.assert_array_equal(adapted.score(BATCH).logprob, case.open(lora=DROPPING).score(BATCH).logprob)


def check_every_weight_has_the_gradient_of_the_loss(case: Case) -> None:
    """A small step along a tensor's gradient changes the loss by that gradient's square."""
    session = opened(case, GRADIENT)
    start = session.get_state()
    session.step([BATCH], 0.0)
    grads = {name: session.get_state().moments[f"{name}.exp_avg"] for name in start.adapter}
    for name, grad in grads.items():
        length = float(np.linalg.norm(grad))
        assert length > 0, name
        way = grad / length * (1e-2 * float(np.linalg.norm(start.adapter[name])))
        losses = []
        for sign in (1, -1):
            session.set_state(TrainState(0, {**start.adapter, name: start.adapter[name] + sign * way}, {}))
            losses.append(mean_nll(session, BATCH))
        expected = 2 * float((grad * way).sum())
        assert losses[0] - losses[1] == pytest.approx(expected, rel=0.05, abs=2e-5), name


def check_every_token_that_is_read_trains(case: Case) -> None:
    """The one that pads too: a library may leave its row out."""
    session = opened(case, GRADIENT)
    inputs = BATCH.inputs.copy()
    inputs[0, np.flatnonzero(BATCH.weights[0])[0]] = 0
    session.step([replace(BATCH, inputs=inputs)], 0.0)
    found = session.get_state().moments
    names = [name for name in found if "embed" in name and name.endswith("exp_avg")]
    assert names and all(found[name][0].any() for name in names)


def check_a_whole_model_learns_the_same_however_rows_are_cut(case: Case) -> None:
    rows = [padded(part(BATCH, 4, 3), 2), part(BATCH, 2), part(BATCH, 1, 0)]
    for batch, pieces in ((BATCH, rows), (prefixed(), [joined(prefixed())])):
        whole, cut = opened(case), opened(case)
        expected = whole.step([batch], LR)
        found = cut.step(pieces, LR)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        close(cut.get_state(), whole.get_state(), 2e-4)


def check_a_whole_model_resumes_exactly(case: Case) -> None:
    straight, resumed = opened(case), opened(case)
    for batch in (BATCH, OTHER):
        straight.step([batch], LR)
    state = straight.get_state()
    resumed.set_state(state)
    straight.step([OTHER], LR), resumed.step([OTHER], LR)
    identical(resumed.get_state(), straight.get_state())
    assert state.step == 2 and differ(state, straight.get_state())  # and it is a copy
    with pytest.raises(IncompatibleState, match="missing"):
        resumed.set_state(TrainState(0, dict(list(state.adapter.items())[1:]), {}))
    identical(resumed.get_state(), straight.get_state())


def check_a_whole_model_learns(case: Case) -> None:
    session = opened(case)
    losses = [session.step([BATCH], 1e-2).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert mean_nll(session, BATCH) < 0.6 * losses[0]


def check_weights_of_a_whole_model_are_those_of_now(case: Case) -> None:
    session = opened(case)
    session.step([BATCH], 1e-2)
    now, module = session.get_state().adapter, "model.layers.0.mlp.up_proj"
    np.testing.assert_array_equal(session.base_weight(module), now[f"{module}.weight"])
    assert not np.array_equal(session.base_weight(module), session.untrained()[f"{module}.weight"])


def check_recomputation_changes_no_whole_model(case: Case) -> None:
    plain, again = opened(case), opened(case, checkpointing=True)
    for session in (plain, again):
        session.step([BATCH], LR)
    close(again.get_state(), plain.get_state(), 2e-4)


def check_quantised_weights_do_not_train(case: Case) -> None:
    if case.quantize == "none":
        return
    with pytest.raises(BackendError, match="quantize: none"):
        case.open(lora=WHOLE)
