"""Experts: quantised with the rest or refused, counted by scheme and forecast, trained as their makers pack them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends import libraries, registry
from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.memory_plan import read_architecture, weight_bytes
from backends.model_folder import ModelFolder
from tests.conformance.toy import Case, random_adapter, toy_batch

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from backends.mlx_backend.lora import dense  # noqa: E402
from backends.mlx_backend.model import unread  # noqa: E402
from tests.tiny_families import published  # noqa: E402
from tests.tiny_models import tiny_llama  # noqa: E402

LORA, BATCH = LoraSpec(4, 8.0), toy_batch()
# name -> quantised layers of the blocks, and weights in their experts: blocks x experts x (gate, up, down)
EXPERTS = {
    "qwen3_moe": ("affine4/64 (12 of 16 linear layers), affine4/32 (2 of 16 linear layers)", 2 * 4 * 3 * 64 * 32),
    "granite4_h_moe": (None, 2 * 4 * 3 * 64 * 128),
    "gemma4_moe": (None, 2 * 4 * 3 * 64 * 32),
    "qwen3_5_moe": (None, 4 * 4 * 3 * 64 * 32),
}
ROUTERS = ("mlp.gate", "router.layer", "router.proj")  # what chooses the experts, in each family


@pytest.mark.parametrize("name", EXPERTS)
def test_mlx_quantises_experts_and_trains_what_it_holds(name: str, tmp_path: Path) -> None:
    """Beside it the same numbers unpacked: equal log-probabilities and an equal gradient."""
    folder = published(name, tmp_path / "base")
    session = Case("mlx", folder, "4bit").open()
    scheme, _ = EXPERTS[name]
    assert scheme in (None, session.scheme)
    model = session._forward.model
    packed = {path for path, module in model.named_modules() if "bits" in vars(module) or hasattr(module, "bits")}
    experts = [path for path in packed if "experts" in path or "switch_mlp" in path]
    routers = [path for path, _ in model.named_modules() if path.endswith((*ROUTERS, "shared_expert_gate"))]
    assert experts and len(routers) >= len(model.layers) and not packed & {*routers}
    unpacked = {path: dense(module) for path, module in model.named_modules() if path in packed}
    weights = {
        name.replace(".linear.", "."): value
        for name, value in tree_flatten(model.parameters())
        if not name.endswith((".scales", ".biases", ".lora_a", ".lora_b"))
    } | {f"{path.removesuffix('.linear')}.weight": weight for path, weight in unpacked.items()}
    (tmp_path / "plain").mkdir()
    mx.save_safetensors(str(tmp_path / "plain" / "model.safetensors"), weights)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(ModelFolder.open(folder).config))
    plain = Case("mlx", tmp_path / "plain").open()
    state = random_adapter(session)
    session.set_state(state), plain.set_state(state)
    np.testing.assert_allclose(session.score(BATCH).logprob, plain.score(BATCH).logprob, atol=1e-4)
    ours, theirs = session.step([BATCH], 1e-2), plain.step([BATCH], 1e-2)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_what_is_added_to_the_scores_of_experts_stays_in_float32(quantize: Any, tmp_path: Path) -> None:
    """In 16 bits it would choose other experts."""
    folder, name = published("glm4_moe", tmp_path / "base"), "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(folder / "model.safetensors")[name]
    spec = ModelSpec(folder, quantize, "bfloat16")
    model = unread(spec, mx.bfloat16)
    held = dict(tree_flatten(model.parameters()))
    assert np.array_equal(stored, np.array(held[name])) and held["model.norm.weight"].dtype == mx.bfloat16
    assert {module.scales.dtype for module in model.modules() if hasattr(module, "bits")} <= {mx.bfloat16}
    lines = libraries.loading_lines("mlx", spec, str(folder), "adapter", "cpu", "bfloat16")
    names: dict[str, Any] = {}
    exec(str(lines).partition("model = load_adapters")[0], names)
    theirs = dict(tree_flatten(names["model"].parameters()))
    assert {n: x.dtype for n, x in theirs.items()} == {n: x.dtype for n, x in held.items()}


@pytest.mark.parametrize("name", [*EXPERTS, "gpt_oss", "gpt_oss_mxfp4"])
def test_torch_refuses_4_bits_that_would_leave_the_experts_out(name: str, tmp_path: Path) -> None:
    folder = published(name, tmp_path)
    with pytest.raises(BackendError, match=r"does not quantise experts, which are \d\d% of this model.s blocks"):
        registry.check_model("torch", ModelSpec(folder, "4bit"), LORA)
    registry.check_model("torch", ModelSpec(folder), LORA)


@pytest.mark.parametrize("name", ["llama", "granite4"])
def test_a_model_without_experts_is_quantised(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path) if name == "llama" else published(name, tmp_path)
    registry.check_model("torch", ModelSpec(folder, "4bit"), LORA)
    assert read_architecture(ModelFolder.open(folder)).experts == 0


def test_experts_that_stay_as_they_are_are_not_called_quantised(tmp_path: Path) -> None:
    session = Case("torch", published("qwen3_moe", tmp_path), "4bit").open()
    assert session.scheme.startswith("nf4/64 double (") and "of the blocks' weights; the rest is not)" in session.scheme


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_experts_in_mxfp4_are_kept_in_mlx_and_unpacked_in_torch(quantize: str, tmp_path: Path) -> None:
    """What both compute is the same; `quantize: 4bit` finds nothing left to do in MLX."""
    folder = published("gpt_oss_mxfp4", tmp_path)
    packed, unpacked = Case("mlx", folder, quantize).open(), Case("torch", folder).open()
    assert packed.scheme == "mxfp4/32 (6 of 16 linear layers)" and unpacked.scheme == "none"
    state = random_adapter(packed)
    packed.set_state(state), unpacked.set_state(state)
    np.testing.assert_allclose(packed.score(BATCH).logprob, unpacked.score(BATCH).logprob, atol=1e-4)


@pytest.mark.parametrize("name", [*EXPERTS, "gpt_oss", "gpt_oss_mxfp4"])
def test_the_forecast_counts_experts_as_they_are_held(name: str, tmp_path: Path) -> None:
    folder = published(name, tmp_path)
    shape, mlx, torch_costs = read_architecture(ModelFolder.open(folder)), *map(_costs, ("mlx", "torch"))
    count = EXPERTS[name][1] if name in EXPERTS else 2 * 4 * 3 * 64 * 128
    assert (shape.experts, shape.experts_packed) == (count, name == "gpt_oss_mxfp4")
    rest = shape.linear + shape.other
    assert weight_bytes(shape, "none", 4, torch_costs) == 4 * (rest + count)
    of_expert = 0.53125 if shape.experts_packed else 4
    assert weight_bytes(shape, "none", 4, mlx) == 4 * rest + of_expert * count
    held = {name: value.nbytes for name, value in _parameters(folder, "none").items()}
    assert weight_bytes(shape, "none", 4, mlx) == pytest.approx(sum(held.values()), rel=0.01)
    if not shape.experts_packed and name != "gpt_oss":
        held = {name: value.nbytes for name, value in _parameters(folder, "4bit").items()}
        assert weight_bytes(shape, "4bit", 4, mlx) == pytest.approx(sum(held.values()), rel=0.05)


def _costs(backend: str) -> Any:
    return registry.costs(backend, "cpu")


def _parameters(folder: Path, quantize: Any) -> dict[str, Any]:
    """As they are held: by MLX, where it reads them."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gpt_oss" and "quantization_config" not in config:
        tensors = Case("torch", folder).open()._model.named_parameters()
    else:
        tensors = tree_flatten(Case("mlx", folder, quantize).open()._forward.model.parameters())
    return {name: value for name, value in tensors if "lora_" not in name}
