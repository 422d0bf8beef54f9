"""The bridge from MLX to numpy's BLAS: the same products, and only where MLX has slow ones."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
pytest.importorskip("torch")

from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec  # noqa: E402
from backends.mlx_backend import blas_bridge  # noqa: E402
from backends.mlx_backend import session as mlx_backend  # noqa: E402
from backends.mlx_backend.costs import NUMPY_PRODUCTS  # noqa: E402
from backends.mlx_backend.lora import AdaptedLinear  # noqa: E402
from tests.tiny_models import family, tiny_llama  # noqa: E402

CPU = mx.Device(mx.cpu)


def opened(folder: Path, lora: LoraSpec | None = None, **model: Any) -> mlx_backend.MlxSession:
    return mlx_backend.open(ModelSpec(folder, device="cpu", **model), lora or LoraSpec(4, 8.0), OptimSpec(), 0)


def a_batch(rows: int = 4, width: int = 12, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 128, (rows, width + 1)).astype(np.int32)
    weights = (random.random((rows, width)) < 0.5).astype(np.float32)
    weights[:, -1] = 1.0
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def types_of(session: mlx_backend.MlxSession) -> set[type]:
    return {type(module) for module in session._forward.model.modules()}


BRIDGED = set(blas_bridge._BRIDGED.values())


def test_it_is_for_a_linux_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (sys.platform == "linux") == blas_bridge.ENABLED
    monkeypatch.setattr(blas_bridge, "ENABLED", True)
    assert blas_bridge.serves(CPU, mx.float32, checkpointing=False)
    assert not blas_bridge.serves(mx.Device(mx.gpu), mx.float32, checkpointing=False)
    assert not blas_bridge.serves(CPU, mx.bfloat16, checkpointing=False)
    assert not blas_bridge.serves(CPU, mx.float32, checkpointing=True)
    monkeypatch.setattr(blas_bridge, "ENABLED", False)
    assert not blas_bridge.serves(CPU, mx.float32, checkpointing=False)


def test_only_the_session_s_own_model_goes_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas_bridge, "ENABLED", True)
    bridged = opened(tiny_llama(tmp_path))
    assert NUMPY_PRODUCTS in bridged.shortcuts and types_of(bridged) & BRIDGED
    for settings in ({"dtype": "bfloat16"}, {"checkpointing": True}):
        session = opened(tmp_path, **settings)
        assert NUMPY_PRODUCTS not in session.shortcuts and not types_of(session) & BRIDGED
    monkeypatch.setattr(blas_bridge, "ENABLED", False)
    plain = opened(tmp_path)
    assert NUMPY_PRODUCTS not in plain.shortcuts and not types_of(plain) & BRIDGED
    assert AdaptedLinear in types_of(plain)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_its_products_are_the_same_products(
    targets: tuple[str, ...], quantize: str, tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family("qwen2", tmp_path, tie_word_embeddings=tie)  # it has biases
    lora = LoraSpec(4, 8.0, targets=targets)
    monkeypatch.setattr(blas_bridge, "ENABLED", True)
    bridged = opened(folder, lora, quantize=quantize)
    monkeypatch.setattr(blas_bridge, "ENABLED", False)
    plain = opened(folder, lora, quantize=quantize)
    for step in range(3):
        ours, theirs = (session.step([a_batch(seed=step)], 1e-3) for session in (bridged, plain))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    np.testing.assert_allclose(bridged.score(a_batch()).logprob, plain.score(a_batch()).logprob, atol=1e-3)
    assert bridged.generate([[5, 6, 7]], 6, []) == plain.generate([[5, 6, 7]], 6, [])
    for name, moment in plain.get_state().moments.items():
        limit = 1e-3 * max(float(np.abs(moment).max()), 1e-9)
        np.testing.assert_allclose(bridged.get_state().moments[name], moment, atol=limit, err_msg=name)


def test_products_go_to_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and the backward pass: every adapted layer's, and the head's."""
    monkeypatch.setattr(blas_bridge, "ENABLED", True)
    session = opened(tiny_llama(tmp_path, tie=True))
    session.step([a_batch()], 1e-3)
    weights, heads = [], []
    weight, head = blas_bridge._weight, session._forward.model.model.embed_tokens
    monkeypatch.setattr(
        blas_bridge, "_weight", lambda linear: (heads if linear is head else weights).append(1) or weight(linear)
    )
    session.step([a_batch()], 1e-3)
    assert len(weights) == 2 * len(session.lora_shapes)  # there and back
    assert len(heads) == 1 + 2  # for no position, where its states are wanted; there and back


def test_numbers_that_blas_does_not_know_stay_in_mlx() -> None:
    layer = nn.Linear(64, 64, bias=False)
    blas_bridge.connect(layer)
    assert type(layer) in BRIDGED and layer(mx.ones((9, 64))).dtype == mx.float32
    assert layer(mx.ones((9, 64), mx.bfloat16)).shape == (9, 64)
    packed = nn.QuantizedLinear.from_linear(nn.Linear(64, 64, bias=False), 32, 4, mode="mxfp4")
    expected = np.array(packed(mx.ones((9, 64))))
    blas_bridge.connect(packed)
    np.testing.assert_array_equal(np.array(packed(mx.ones((9, 64)))), expected)


def test_no_block_s_scores_outlive_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace keeps what is computed in it: each block more would add the scores of all its queries."""
    monkeypatch.setattr(blas_bridge, "ENABLED", True)
    session = opened(tiny_llama(tmp_path, num_hidden_layers=3))
    row, peaks = a_batch(1, 1536), []
    for at_once in (True, False):
        session._forward._attention.at_once = at_once
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        session.step([row], 1e-3)
        peaks.append(mx.get_peak_memory() - before)
    assert opened(tmp_path)._forward._attention.at_once
    assert peaks[0] < 0.7 * peaks[1], peaks
