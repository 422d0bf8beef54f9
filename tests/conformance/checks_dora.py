"""Promises of a session with DoRA: the rows of the adapted weights have lengths of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from backends.interface import MAGNITUDE, FloatArray, OptimSpec, Session, TrainState
from tests.conformance.toy import LORA, Case, begun, close, identical, part, prefixed, random_adapter, toy_batch

DORA = replace(LORA, dora=True)
BATCH, OTHER = toy_batch(), toy_batch(seed=1)
LR = 1e-2
GRADIENT = OptimSpec(betas=(0.0, 0.0), clip_norm=None)  # the first moments are the step's gradient


def _lengths(session: Session, adapter: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Of the rows of W + scale * B A, for every module, as magnitudes."""
    found = {}
    for module in session.lora_shapes:
        changed = adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
        whole = session.base_weight(module) + DORA.scale * changed
        found[f"{module}.{MAGNITUDE}"] = np.linalg.norm(whole.astype(np.float64), axis=1).astype(np.float32)
    return found


def check_dora_starts_at_the_base(case: Case) -> None:
    session, plain = case.open(lora=DORA), case.open()
    adapter = session.get_state().adapter
    modules = list(session.lora_shapes)
    assert list(adapter) == [f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B", MAGNITUDE)]
    magnitudes = {name: value for name, value in session.untrained().items() if name.endswith(MAGNITUDE)}
    assert list(magnitudes) == [f"{m}.{MAGNITUDE}" for m in modules] and adapter.keys() > plain.untrained().keys()
    for name, lengths in _lengths(session, adapter).items():
        np.testing.assert_allclose(magnitudes[name], lengths, rtol=1e-5)
        np.testing.assert_array_equal(adapter[name], magnitudes[name])
    expected = plain.score(BATCH).logprob
    np.testing.assert_allclose(session.score(BATCH).logprob, expected, atol=2e-5)
    later = random_adapter(session).adapter  # without its B and magnitudes the model is the base again
    without = {name: value * 0 if name.endswith("lora_B") else value for name, value in later.items()}
    session.set_state(TrainState(0, {**without, **magnitudes}, {}))
    np.testing.assert_allclose(session.score(BATCH).logprob, expected, atol=2e-5)


def check_magnitudes_are_the_lengths_of_the_rows(case: Case) -> None:
    """With the lengths that the rows have anyway, DoRA is LoRA; with twice those of one module, it is not."""
    session, plain = begun(case, lora=DORA), begun(case)
    factors = plain.get_state().adapter
    lengths = _lengths(session, factors)
    session.set_state(TrainState(0, {**factors, **lengths}, {}))
    for batch in (BATCH, prefixed()):
        np.testing.assert_allclose(session.score(batch).logprob, plain.score(batch).logprob, atol=5e-5)
    name = f"{next(iter(session.lora_shapes))}.{MAGNITUDE}"
    session.set_state(TrainState(0, {**factors, **lengths, name: 2 * lengths[name]}, {}))
    assert np.abs(session.score(BATCH).logprob - plain.score(BATCH).logprob).max() > 1e-4


def check_doras_gradient_is_that_of_its_loss(case: Case) -> None:
    """The lengths of W + scale * B A count as constants: where A or B change, m changes with them."""
    session = begun(case, lora=DORA, optim=GRADIENT)
    start = session.get_state().adapter
    start = {**start, **{name: 1.3 * length for name, length in _lengths(session, start).items()}}
    session.set_state(TrainState(0, start, {}))
    session.step([BATCH], 0.0)
    moments = session.get_state().moments
    for kind in ("lora_A", "lora_B", MAGNITUDE):
        names = [name for name in start if name.endswith(kind)]
        along = {name: moments[f"{name}.exp_avg"] for name in names}
        expected = float(np.sqrt(sum(np.square(one.astype(np.float64)).sum() for one in along.values())))
        assert expected > 1e-5, kind
        step = 3e-3 / expected
        losses = [_loss(session, start, along, sign * step, kind != MAGNITUDE) for sign in (1, -1)]
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected**2, rel=3e-2), kind


def _loss(
    session: Session, start: Mapping[str, FloatArray], along: Mapping[str, FloatArray], by: float, held: bool
) -> float:
    """After a move; held: with magnitudes that leave the gates as they were."""
    moved = {name: (value + by * along.get(name, 0.0)).astype(np.float32) for name, value in start.items()}
    if held:
        before, after = _lengths(session, start), _lengths(session, moved)
        moved |= {name: moved[name] * after[name] / before[name] for name in before}
    session.set_state(TrainState(0, moved, {}))
    logprob = session.score(BATCH).logprob.astype(np.float64)
    return float(-(logprob * BATCH.weights).sum() / BATCH.weights.sum())


def check_dora_learns_the_same_however_rows_are_cut(case: Case) -> None:
    whole, split = begun(case, lora=DORA), begun(case, lora=DORA)
    ours, theirs = whole.step([BATCH], LR), split.step([part(BATCH, 4, 3), part(BATCH, 2), part(BATCH, 1, 0)], LR)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5) and theirs.tokens == ours.tokens
    close(split.get_state(), whole.get_state(), 2e-4)
    again = case.open(lora=DORA)
    again.set_state(whole.get_state())
    whole.step([OTHER], LR), again.step([OTHER], LR)
    identical(again.get_state(), whole.get_state())


def check_recomputed_blocks_change_nothing_of_dora(case: Case) -> None:
    if case.backend == "reference":
        return
    plain, frugal = (begun(case, lora=DORA, checkpointing=flag) for flag in (False, True))
    ours, theirs = plain.step([prefixed()], LR), frugal.step([prefixed()], LR)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
    close(frugal.get_state(), plain.get_state(), 2e-4)
