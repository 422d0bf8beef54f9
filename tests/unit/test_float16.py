"""float16, for GPUs without bfloat16: near float32, with a fixed loss scale, and the next where a step overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import BackendError, Half, ModelSpec, NonFinite
from backends.loss_scale import loss_scales
from backends.model_folder import ModelFolder
from tests.conformance.toy import REAL_BACKENDS, Case, begun, identical, registered, toy_batch

STEPS, RATE = 8, 1e-2
LOSS, NORM = 5e-3, 1e-2  # relative bounds, of the loss and of the gradient's norm
# Of a token's log-probability. In 4 bits the weights themselves differ: quantised from float16, or scaled by it.
LOGPROB = {"none": 2e-2, "4bit": 0.2}


def use_scales(monkeypatch: pytest.MonkeyPatch, backend: str, *scales: float) -> None:
    module = registry.load(registered(backend))
    monkeypatch.setattr(module, "loss_scales", lambda number_type, weights: scales)


@pytest.fixture(params=REAL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := registry.probe(registered(request.param)):
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_training_is_near_float32(tiny_folder: Path, backend: str, quantize: str) -> None:
    curves, scores = {}, {}
    for dtype in ("float32", "float16"):
        session = Case(backend, tiny_folder, quantize).open(dtype=dtype)
        scores[dtype] = session.score(toy_batch()).logprob
        curves[dtype] = [session.step([toy_batch(seed=step)], RATE) for step in range(STEPS)]
    losses = {dtype: np.array([result.loss for result in curve]) for dtype, curve in curves.items()}
    assert losses["float32"][-1] < losses["float32"][0]
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=LOSS)
    np.testing.assert_allclose(scores["float16"], scores["float32"], atol=LOGPROB[quantize])
    norms = {dtype: curve[0].grad_norm for dtype, curve in curves.items()}
    assert norms["float16"] == pytest.approx(norms["float32"], rel=NORM if quantize == "none" else 5 * NORM)


def test_without_a_scale_small_gradients_are_lost(
    tiny_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: what the bound above would miss if nothing were scaled in a step of many tokens."""
    norms = []
    for scales in (loss_scales("float16", 1.0), (1e-6,)):
        use_scales(monkeypatch, backend, *scales)
        norms.append(Case(backend, tiny_folder).open(dtype="float16").step([toy_batch()], RATE).grad_norm)
    assert norms[1] < (1 - NORM) * norms[0]


def test_a_step_that_overflows_is_computed_again_at_the_next_scale(
    tiny_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []
    for scales in ((1e9, 64.0), (64.0,)):
        use_scales(monkeypatch, backend, *scales)
        session = Case(backend, tiny_folder).open(dtype="float16")
        results = [session.step([toy_batch(seed=step)], RATE) for step in range(3)]
        sessions.append((session.get_state(), [result.loss for result in results]))
    assert sessions[0][1] == sessions[1][1]
    identical(sessions[0][0], sessions[1][0])


def test_where_no_scale_helps_the_step_is_not_applied(
    tiny_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_scales(monkeypatch, backend, 1e9, 1e8)
    session: Any = begun(Case(backend, tiny_folder), dtype="float16")
    before = session.get_state()
    with pytest.raises(NonFinite):
        session.step([toy_batch()], RATE)
    identical(before, session.get_state())


def test_only_float16_is_scaled() -> None:
    assert loss_scales("float32", 7.0) == loss_scales("bfloat16", 7.0) == (1.0,)
    scales = loss_scales("float16", 7.0)
    assert list(scales) == sorted(scales, reverse=True) and scales[0] == 7 * 128


@pytest.mark.parametrize(
    ("capability", "half"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_torch_takes_float16_where_a_card_has_no_bfloat16(
    capability: tuple[int, int], half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from backends.torch_backend.device import half_type

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_type(torch.device("cuda", 0)) == half
    assert half_type(torch.device("cpu")) == half_type(torch.device("mps")) == "bfloat16"


@pytest.mark.parametrize(
    ("architecture", "half"),
    [("applegpu_g13g", "float16"), ("applegpu_g14s", "float16"), ("applegpu_g15d", "bfloat16"), ("", "bfloat16")],
)
def test_mlx_takes_float16_on_m1_and_m2(architecture: str, half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    from backends.mlx_backend.device import half_type

    monkeypatch.setattr(mx, "device_info", lambda device: {"architecture": architecture})
    assert half_type(type("Gpu", (), {"type": mx.gpu})()) == half
    assert half_type(mx.Device(mx.cpu)) == "bfloat16"


def outgrowing(name: str, folder: Path) -> Path:
    """A model whose hidden states pass 65,504: what its blocks add to them is 100,000 times as large."""
    from safetensors.numpy import load_file, save_file

    from tests.tiny_models import family

    file = family(name, folder) / "model.safetensors"
    tensors = load_file(file)
    grown = ".post_feedforward_layernorm.weight" if name.startswith("gemma") else ".mlp.down_proj.weight"
    for key in [key for key in tensors if key.endswith(grown)]:
        tensors[key] = np.full_like(tensors[key], 6e4) if tensors[key].ndim == 1 else tensors[key] * np.float32(1e5)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_a_model_too_large_for_float16_is_refused_in_it(name: str, backend: str, tmp_path: Path) -> None:
    folder = outgrowing(name, tmp_path / name)
    with pytest.raises(BackendError, match=r"float16.*model\.dtype: bfloat16"):
        Case(backend, folder).open(dtype="float16")
    for dtype in ("float32", "bfloat16"):
        assert np.isfinite(Case(backend, folder).open(dtype=dtype).score(toy_batch()).logprob).all()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3_text", "llama"])
def test_auto_takes_no_float16_for_gemma(name: str, backend: str, tmp_path: Path, monkeypatch: Any) -> None:
    """On a GPU without bfloat16 of its own: what a session on one computes in, and what forecasts count with."""
    from tests.tiny_families import published
    from tests.tiny_models import family

    folder = published(name, tmp_path / name) if name == "gemma3" else family(name, tmp_path / name)
    expected = "float16" if name == "llama" else "bfloat16"
    spec = ModelSpec(folder, folder=ModelFolder.open(folder))
    assert [spec.number_type("gpu", "float16"), spec.number_type("cpu", "float16")] == [expected, "float32"]
    loading = ["backends.torch_backend.model"] if backend == "torch" else []
    for module in [registry.row(registered(backend)).session, *loading]:
        monkeypatch.setattr(f"{module}.half_type", lambda device: "float16")
        monkeypatch.setattr(f"{module}.device_kind", lambda device: "gpu")
    session: Any = Case(backend, folder).open(dtype="auto")
    assert session._number_type == expected
    assert np.isfinite(session.score(toy_batch()).logprob).all()


def test_auto_is_the_type_that_the_device_is_made_for() -> None:
    spec = ModelSpec(Path("m"))
    assert [spec.number_type("cpu"), spec.number_type("gpu"), spec.number_type("gpu", "float16")] == [
        "float32", "bfloat16", "float16",
    ]  # fmt: skip
    assert ModelSpec(Path("m"), dtype="float32").number_type("gpu", "float16") == "float32"
    assert [ModelSpec(Path("m"), dtype=dtype).number_bytes("cpu") for dtype in ("float32", "float16")] == [4, 2]
