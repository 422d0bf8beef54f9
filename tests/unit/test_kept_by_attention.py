"""What attention keeps for the backward pass: the forecast beside tiny models that are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from backends import registry
from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec
from backends.memory_plan import Micro, footprint, read_architecture
from backends.model_folder import ModelFolder
from backends.predictions import Architecture, Costs, Recurrence

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from backends.mlx_backend import blas_bridge  # noqa: E402
from backends.mlx_backend import costs as mlx_costs  # noqa: E402
from backends.torch_backend.costs import APPLE, NVIDIA  # noqa: E402
from tests.tiny_families import MODELS, published  # noqa: E402
from tests.tiny_models import family  # noqa: E402

Sizes = dict[str, Any]
LORA = LoraSpec(4, 8.0)


def saved(kind: str, tokens: int, dtype: Any = torch.float32, **settings: Any) -> int:
    """Bytes that autograd keeps of one row of a tiny model, weights aside."""
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def noted(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    ids = torch.randint(3, 100, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
        return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("number", [4, 2])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_weights_of_every_pair_are_counted_where_torch_keeps_them(kind: str, number: int, tmp_path: Path) -> None:
    folder = family(kind, tmp_path, sliding_window=512) if kind == "gemma2" else published(kind, tmp_path)
    given = AutoConfig.from_pretrained(folder).to_diff_dict()
    settings = {key: value for key, value in given.items() if key not in ("dtype", "model_type", "architectures")}
    dtype = {4: torch.float32, 2: torch.bfloat16}[number]
    short, long = (saved(kind, tokens, dtype, **settings) for tokens in (128, 256))
    measured = (long - 2 * short) / (256**2 - 2 * 128**2)  # what grows with the square
    shape = read_architecture(ModelFolder.open(folder))
    expected = registry.costs("torch", "cpu").scores[shape.scores].bytes(number) * shape.heads * shape.blocks
    assert measured == pytest.approx(expected, rel=0.02)
    found = {width: activations(shape, number, width) for width in (128, 256)}
    assert found[256] - 2 * found[128] == pytest.approx(1.5 * expected * (256**2 - 2 * 128**2))


def activations(
    shape: Architecture, number: int, width: int, backend: str = "torch", costs: Costs | None = None
) -> float:
    spec = ModelSpec(Path("model"), dtype="float32" if number == 4 else "bfloat16")
    costs = costs or registry.costs(backend, "cpu")
    return footprint(shape, spec, LORA, shape.modules, Micro(1, width, 4), costs).activations


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_attention_in_pieces_keeps_no_such_weights(name: str, tmp_path: Path) -> None:
    shape = read_architecture(ModelFolder.open(family(name, tmp_path)))
    assert shape.scores == ""
    assert activations(shape, 4, 256) == pytest.approx(2 * activations(shape, 4, 128))


@pytest.mark.parametrize("number", [4, 2])
def test_on_apples_gpus_torch_keeps_the_weights_of_every_pair(number: int, tmp_path: Path) -> None:
    """Its plain attention, which is all that has a gradient there, here on a CPU."""
    folder = family("llama", tmp_path, max_position_embeddings=512)
    given = AutoConfig.from_pretrained(folder).to_diff_dict()
    settings = {key: value for key, value in given.items() if key not in ("dtype", "model_type", "architectures")}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        short, long = (
            saved("llama", tokens, {4: torch.float32, 2: torch.bfloat16}[number], **settings) for tokens in (128, 256)
        )
    measured = (long - 2 * short) / (256**2 - 2 * 128**2)
    shape = read_architecture(ModelFolder.open(folder))
    assert measured == pytest.approx(4 * shape.heads * shape.blocks)
    found = {width: activations(shape, number, width, costs=APPLE) for width in (128, 256)}
    assert found[256] - 2 * found[128] == pytest.approx(APPLE.held * measured * (256**2 - 2 * 128**2))
    assert activations(shape, number, 256, costs=NVIDIA) == pytest.approx(
        2 * activations(shape, number, 128, costs=NVIDIA)
    )


@pytest.mark.parametrize("number", [4, 2])
@pytest.mark.parametrize(("key_heads", "keys", "values"), [(2, 64, 64), (4, 32, 64), (2, 64, 96)])
def test_what_torch_keeps_of_a_recurrence(key_heads: int, keys: int, values: int, number: int) -> None:
    """Beside a smaller recurrence, in three blocks of which all have one."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[number]

    def sizes(key_heads: int, keys: int, values: int) -> Sizes:
        text = MODELS["qwen3_5"][1]["text_config"]
        return text | {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3} | {
            "linear_num_key_heads": key_heads, "linear_num_value_heads": 4,
            "linear_key_head_dim": keys, "linear_value_head_dim": values,
        }  # fmt: skip

    def predicted(settings: Sizes) -> float:
        from backends.config_sizes import recurrence_of

        recurrence = recurrence_of(settings)
        assert recurrence is not None and recurrence.blocks == 3
        return registry.costs("torch", "cpu").recurrent(recurrence, number)

    small, large = sizes(2, 16, 16), sizes(key_heads, keys, values)
    measured = [saved("qwen3_5_text", 256, dtype, **settings) / 3 / 256 for settings in (small, large)]
    assert predicted(large) - predicted(small) == pytest.approx(measured[1] - measured[0], rel=0.1)
    assert measured[0] > predicted(small)  # and the rest of the block


def peak(folder: Path, tokens: int, dtype: Any) -> int:
    """Bytes that a step of MLX takes and gives back."""
    session: Any = registry.open_session("mlx", ModelSpec(folder, dtype=dtype), LORA, OptimSpec(), 0)
    ids = np.random.default_rng(0).integers(3, 100, (1, tokens + 1)).astype(np.int32)
    weights = (np.arange(tokens) >= tokens - 4).astype(np.float32)[None]
    batch = Batch(ids[:, :-1], ids[:, 1:], weights)
    session.step([batch], 1e-3)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    session.step([batch], 1e-3)
    return int(mx.get_peak_memory() - before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_softcap_in_mlx_takes_what_was_predicted(
    dtype: Literal["float32", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows so long that the weights of every pair are most of a step."""
    monkeypatch.setattr(blas_bridge, "ENABLED", False)
    folder = family("gemma2", tmp_path, sliding_window=1024, max_position_embeddings=1024)
    shape, spec = read_architecture(ModelFolder.open(folder)), ModelSpec(folder, dtype=dtype)
    costs = replace(registry.costs("mlx", "cpu"), saved=mlx_costs.saved)  # as the products are MLX's own here
    found = footprint(shape, spec, LORA, shape.modules, Micro(1, 512, 4), costs).step
    assert found == pytest.approx(peak(folder, 512, dtype), rel=0.2)
    without = footprint(replace(shape, scores=""), spec, LORA, shape.modules, Micro(1, 512, 4), costs).step
    assert without < 0.5 * found


@pytest.mark.parametrize("heads", [4, 8])
def test_a_recurrence_in_mlx_takes_what_was_predicted(
    heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas_bridge, "ENABLED", False)
    name, (kind, config) = "qwen3_5", MODELS["qwen3_5"]
    widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_value_heads": heads}
    monkeypatch.setitem(MODELS, name, (kind, config | {"text_config": config["text_config"] | widths}))
    folder = published(name, tmp_path)
    shape = read_architecture(ModelFolder.open(folder))
    assert shape.recurrence == Recurrence(3, heads, 2, 64, 64)
    spec, costs = ModelSpec(folder, dtype="float32"), registry.costs("mlx", "cpu")
    found = footprint(shape, spec, LORA, shape.modules, Micro(1, 512, 4), costs).step
    assert found == pytest.approx(peak(folder, 512, "float32"), rel=0.3)
