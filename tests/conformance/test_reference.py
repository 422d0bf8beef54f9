"""The definition itself: its gradient against finite differences, its optimiser against torch's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.interface import BackendError, LoraSpec, OptimSpec, TrainState
from backends.reference import adamw, clipped
from tests.conformance.toy import Case, begun, mean_nll, toy_batch

BATCH = toy_batch()


@pytest.fixture
def bare_folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights: one module of 32 x 32."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 128}), encoding="utf-8")
    return tmp_path


def test_the_gradient_is_that_of_the_loss(bare_folder: Path) -> None:
    session = begun(Case("reference", bare_folder), optim=OptimSpec(betas=(0.0, 0.0), clip_norm=None))
    start = session.get_state()
    session.step([BATCH], 0.0)
    rng = np.random.default_rng(0)
    for name, value in start.adapter.items():
        direction = rng.standard_normal(value.shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            session.set_state(TrainState(0, {**start.adapter, name: value + sign * 1e-2 * direction}, {}))
            ends.append(mean_nll(session, BATCH))
        session.set_state(start)
        session.step([BATCH], 0.0)
        slope = float((session.get_state().moments[f"{name}.exp_avg"] * direction).sum())
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope, rel=1e-2, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-5, 0.1),
    decay=st.floats(0, 0.5),
    limit=st.none() | st.floats(0.01, 10),
)
def test_clipping_and_adamw_are_torchs(seed: int, lr: float, decay: float, limit: float | None) -> None:
    torch = pytest.importorskip("torch")
    rng, optim = np.random.default_rng(seed), OptimSpec(weight_decay=decay)
    weights = {name: rng.standard_normal((3, 4)).astype(np.float32) for name in "ab"}
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()}
    optimiser = torch.optim.AdamW(theirs.values(), lr=lr, weight_decay=decay)
    moments = {name: (np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)) for name in weights}
    for number in (1, 2, 3):
        grads = {name: rng.standard_normal((3, 4)).astype(np.float32) for name in weights}
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grads[name].copy())
        torch.nn.utils.clip_grad_norm_(theirs.values(), np.inf if limit is None else limit)
        optimiser.step()
        for name, grad in clipped(grads, limit)[1].items():
            weights[name], *moments[name] = adamw(weights[name], grad, *moments[name], number, lr, optim)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(weights[name], parameter.detach().numpy(), atol=2e-6 + 1e-4 * lr)


def test_a_folder_without_weights_has_one_module(bare_folder: Path) -> None:
    session = Case("reference", bare_folder).open()
    assert session.lora_shapes == {"model.layers.0.proj": (32, 32)}
    with pytest.raises(BackendError, match="q_proj"):
        Case("reference", bare_folder).open(LoraSpec(4, 8.0, targets=("q_proj",)))


def test_it_refuses_what_it_does_not_compute(bare_folder: Path) -> None:
    with pytest.raises(BackendError, match="float32"):
        Case("reference", bare_folder).open(dtype="bfloat16")
