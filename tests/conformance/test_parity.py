"""Any two real backends are one trainer: on ten families the same probabilities and the same steps, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from backends.interface import OptimSpec, Session
from backends.micro_batches import joined, own_part
from tests.conformance.checks_dora import DORA
from tests.conformance.checks_head import HEADED, classes_of
from tests.conformance.checks_whole import WHOLE
from tests.conformance.toy import (
    DROPPING,
    LORA,
    REAL_BACKENDS,
    Case,
    begun,
    close,
    part,
    prefixed,
    random_adapter,
    toy_batch,
)

pytest.importorskip("torch")

from tests.tiny_models import FAMILIES, family

Usable = Callable[[str], None]
PAIRS = list(combinations(REAL_BACKENDS, 2))
BATCH, OTHER = toy_batch(), toy_batch(seed=1)


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = family(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return folder


@pytest.mark.parametrize("backend", REAL_BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_shared_prefixes_once_and_the_same(
    name: str, backend: str, family_folder: Callable[[str], Path], usable: Usable
) -> None:
    """Windows, caches, biases and rotary embeddings of every family, with prefixes of unequal length."""
    usable(backend)
    batch, whole = prefixed(), joined(prefixed())
    shared, alone = (begun(Case(backend, family_folder(name)), lora=DROPPING) for _ in range(2))
    expected = own_part(alone.score(whole), batch)
    np.testing.assert_allclose(shared.score(batch).logprob, expected.logprob, atol=2e-5)
    ours, theirs = shared.step([batch], 1e-2), alone.step([whole], 1e-2)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    close(shared.get_state(), alone.get_state(), 1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_model(
    name: str, pair: tuple[str, str], family_folder: Callable[[str], Path], usable: Usable
) -> None:
    for backend in pair:
        usable(backend)
    if (
        name == "gemma2"
        and any(backend.startswith("mlx") for backend in pair)
        and version("mlx-lm").startswith("0.31.")
    ):
        pytest.skip("mlx-lm 0.31, the last for Python 3.10, has log-probabilities of Gemma 2 that are 7e-4 off")
    one, other = (Case(backend, family_folder(name)).open(lora=DROPPING) for backend in pair)
    base = one.score(BATCH)
    assert base.logprob[BATCH.weights > 0].std() > 0.3, (
        "the model hardly tells tokens apart; equality would mean little"
    )
    np.testing.assert_allclose(other.score(BATCH).logprob, base.logprob, atol=1e-4)
    state = random_adapter(one)
    for session in (one, other):
        session.set_state(state)
    ours, theirs = one.step([BATCH], 1e-2), other.step([BATCH], 1e-2)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-3)
    close(other.get_state(), one.get_state(), 1e-3)
    np.testing.assert_allclose(other.score(BATCH).logprob, one.score(BATCH).logprob, atol=1e-3)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5])
def test_steps_are_the_same_steps(probability: float, pair: tuple[str, str], tiny_folder: Path, usable: Usable) -> None:
    for backend in pair:
        usable(backend)
    lora, optim = replace(LORA, dropout=probability), OptimSpec(weight_decay=0.01)
    one, other = (Case(backend, tiny_folder).open(lora=lora, optim=optim) for backend in pair)
    np.testing.assert_allclose(_losses(other), _losses(one), rtol=1e-4)
    one.set_state(other.get_state())  # training that began on one backend continues on the other
    np.testing.assert_allclose(_losses(one), _losses(other), rtol=1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), "qwen3"])
def test_a_head_trains_the_same(
    name: str, pair: tuple[str, str], family_folder: Callable[[str], Path], usable: Usable
) -> None:
    for backend in pair:
        usable(backend)
    one, other = (Case(backend, family_folder(name)).open(lora=HEADED) for backend in pair)
    batches = [classes_of(BATCH), classes_of(OTHER)]
    np.testing.assert_allclose(other.states(batches[0]), one.states(batches[0]), atol=1e-4)
    ours, theirs = ([session.step([batches[n % 2]], 5e-3).loss for n in range(12)] for session in (one, other))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert ours[-1] < 0.9 * ours[0]
    one.set_state(other.get_state())
    np.testing.assert_allclose(one.step([batches[0]], 5e-3).loss, other.step([batches[0]], 5e-3).loss, rtol=1e-4)


@pytest.mark.parametrize("name", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_whole_model_trains_the_same(name: str, tmp_path: Path, usable: Usable) -> None:
    """A hundred steps, with the usual epsilon; an output layer of its own, and one that is the embedding."""
    for backend in ("torch", "mlx"):
        usable(backend)
    tied = name == "tied"
    folder = family("llama", tmp_path / name, tie_word_embeddings=True) if tied else family(name, tmp_path / name)
    sessions = [
        Case(backend, folder).open(lora=WHOLE, optim=OptimSpec(weight_decay=0.01)) for backend in ("torch", "mlx")
    ]
    ours, theirs = ([one.step([(BATCH, OTHER)[n % 2]], 3e-4).loss for n in range(100)] for one in sessions)
    # After a hundred steps torch differs from itself, its batch in two halves, by 2.8e-5 where the loss is 0.06.
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=3e-5)
    assert ours[-1] < 0.5 * ours[0]
    sessions[0].set_state(sessions[1].get_state())  # training that began on one backend continues on the other
    ours, theirs = ([one.step([BATCH], 3e-4).loss for _ in range(3)] for one in sessions)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    "name", ["phi3", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("gemma3_text", marks=pytest.mark.slow)]
)
def test_dora_trains_the_same(
    name: str, pair: tuple[str, str], family_folder: Callable[[str], Path], usable: Usable
) -> None:
    """Layers that mlx-lm has in parts, and layers with a bias."""
    for backend in pair:
        usable(backend)
    one, other = (Case(backend, family_folder(name)).open(lora=DORA) for backend in pair)
    ours, theirs = _losses(one), _losses(other)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert ours[-1] < 0.98 * ours[0]
    one.set_state(other.get_state())
    np.testing.assert_allclose(_losses(one), _losses(other), rtol=1e-4)


@pytest.mark.parametrize("backend", REAL_BACKENDS)
def test_an_adapter_merged_into_the_base_is_the_same_model(backend: str, tmp_path: Path, usable: Usable) -> None:
    """W + alpha / rank * B A, written as a model of its own: what the adapter's scale and layout mean."""
    usable(backend)
    folder = family("llama", tmp_path / "base")
    lora = replace(LORA, alpha=12.0)
    session = begun(Case(backend, folder), lora=lora)
    merged = _merged(folder, tmp_path / "merged", session, lora.alpha / lora.rank)
    base = Case(backend, merged).open()
    np.testing.assert_allclose(session.score(BATCH).logprob, base.score(BATCH).logprob, atol=1e-4)


def _losses(session: Session) -> list[float]:
    batches = [[part(BATCH, 0, 1), part(BATCH, 2, 3, 4)], [OTHER]]
    return [session.step(batches[number % 2], 5e-3).loss for number in range(12)]


def _merged(folder: Path, target: Path, session: Session, scale: float) -> Path:
    from safetensors.numpy import load_file, save_file

    weights, adapter = load_file(folder / "model.safetensors"), session.get_state().adapter
    for module in session.lora_shapes:
        weights[f"{module}.weight"] += scale * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target
