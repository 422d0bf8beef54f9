"""Which files of a folder are the model, and how its weights are stored: read alike by every backend, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import registry
from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.model_folder import ModelFolder
from finetune.disk.adapter_check import loadings
from tests.conformance.toy import Case, toy_batch

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten  # noqa: E402

from backends.mlx_backend import session as mlx_session  # noqa: E402
from tests.tiny_families import published  # noqa: E402
from tests.tiny_models import tiny_llama  # noqa: E402
from tests.unit.test_adapter_names import chosen, in_peft, written  # noqa: E402

LORA, BATCH = LoraSpec(4, 8.0), toy_batch()
INDEX = "model.safetensors.index.json"


def logprobs(folder: Path) -> list[np.ndarray]:
    return [Case(backend, folder).open().score(BATCH).logprob for backend in ("torch", "mlx")]


def sharded(folder: Path, name: str, scale: float) -> dict[str, str]:
    """The folder's weights, times `scale`, in two files called by `name`; which tensor is where."""
    weights = {key: value * np.float32(scale) for key, value in load_file(folder / "model.safetensors").items()}
    names = sorted(weights)
    parts = {f"{name}-00001-of-00002.safetensors": names[:9], f"{name}-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / file, metadata={"format": "pt"})
    return {key: file for file, part in parts.items() for key in part}


def test_shards_beside_a_whole_model_are_not_read_and_are_reported(tmp_path: Path) -> None:
    expected = logprobs(tiny_llama(tmp_path / "clean"))[0]
    folder = tiny_llama(tmp_path / "stale")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": sharded(folder, "model", 3.0)}))
    for found in logprobs(folder):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    (note,) = ModelFolder.open(folder).notes
    assert "not read: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in note


def test_of_two_sets_of_shards_the_one_that_the_index_names_is_read(tmp_path: Path) -> None:
    expected = logprobs(tiny_llama(tmp_path / "clean"))[0]
    folder = tiny_llama(tmp_path / "twice")
    sharded(folder, "model", 3.0)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": sharded(folder, "model-new", 1.0)}))
    (folder / "model.safetensors").unlink()
    for found in logprobs(folder):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert "model-00001" in ModelFolder.open(folder).notes[0]
    assert "model-new" not in ModelFolder.open(folder).notes[0]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_parts_beside_the_language_model_are_reported(name: str, tmp_path: Path) -> None:
    parts = {"gemma3": "multi_modal_projector, vision_tower", "qwen3_5": "mtp, visual"}[name]
    assert ModelFolder.open(published(name, tmp_path)).notes == (
        f"the model's {parts}: not part of its language model, and not trained",
    )


def test_a_plain_folder_has_nothing_to_tell(tmp_path: Path) -> None:
    assert ModelFolder.open(tiny_llama(tmp_path)).notes == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, "mxfp4", "nvfp4", "mxfp8", "mixed_3_6", "unnamed"])
def test_mlx_weights_are_trained_as_they_come(bits: int | str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    base = tiny_llama(tmp_path / "base", hidden_size=192, head_dim=48)
    settings: dict[str, Any] = {"q_bits": bits} if isinstance(bits, int) else {"quant_predicate": "mixed_3_6"}
    quantised(base, tmp_path / "packed", {"mode": bits} if str(bits)[2:4] == "fp" else settings)
    if bits == "unnamed":
        config = json.loads((tmp_path / "packed" / "config.json").read_text())
        shared = {key: config["quantization"][key] for key in ("group_size", "bits")}
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization": shared}))
    modules = ModelFolder.open(tmp_path / "packed").lora_modules(LORA)
    assert modules == ModelFolder.open(base).lora_modules(LORA)
    session = Case("mlx", tmp_path / "packed").open()
    plain, config = load_model(tmp_path / "packed")
    theirs = chosen(np.array(plain(mx.array(BATCH.inputs)).astype(mx.float32)))
    np.testing.assert_allclose(session.score(BATCH).logprob, theirs, atol=2e-3 if str(bits)[2:4] == "fp" else 1e-4)
    if "fp" in str(bits):
        assert session.scheme == f"{bits}/{config['quantization']['group_size']}"
    first, second = (session.step([BATCH], 1e-2).loss for _ in range(2))
    assert second < first


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_float16_scales_stay_as_they_are_stored_unless_the_recipe_says_otherwise(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where `auto` is bfloat16 for other models."""
    base = tiny_llama(tmp_path / "base")
    quantised(base, tmp_path / "packed", {"dtype": "float16"})
    scales = {n: t for n, t in load_file(tmp_path / "packed/model.safetensors").items() if n.endswith(".scales")}
    assert len(scales) == 16 and all(scale.dtype == np.float16 for scale in scales.values())
    monkeypatch.setattr(mlx_session, "device_kind", lambda device: "gpu")
    session: Any = Case("mlx", tmp_path / "packed").open(dtype=dtype)
    tensors = dict(tree_flatten(session._forward.model.parameters()))
    held = {name.replace(".linear.", "."): tensor.astype(mx.float32) for name, tensor in tensors.items()}
    same = {np.array_equal(held[name], scale) for name, scale in scales.items()}
    assert same == {dtype == "auto"}
    assert session.score(BATCH).logprob.std() > 0
    assert ModelSpec(base, folder=ModelFolder.open(base)).number_type("gpu") == "bfloat16"


def quantised(base: Path, target: Path, settings: dict[str, Any]) -> None:
    """mlx-lm's own conversion, without the tokenizer that it copies."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(base, lazy=True)
    model.set_dtype(getattr(mx, settings.get("dtype", "float32")))
    predicate = settings.get("quant_predicate")
    if predicate:
        from mlx_lm.convert import mixed_quant_predicate_builder

        predicate = mixed_quant_predicate_builder(predicate, model)
    if mode := settings.get("mode"):
        model, config = quantize_model(model, config, None, None, mode=mode)
    else:
        model, config = quantize_model(model, config, 64, settings.get("q_bits", 4), quant_predicate=predicate)
    mx.eval(model.parameters())
    target.mkdir()
    save_model(target, model)
    save_config(config, target / "config.json")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(
    ("method", "words"),
    [("gptq", "GPTQ"), ("awq", "AWQ"), ("fp8", "FP8"), ("compressed-tensors", "compressed-tensors"), ("eetq", "eetq")],
)
def test_weights_that_are_quantised_otherwise_are_refused_by_their_method(
    backend: str, method: str, words: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    weights = load_file(folder / "model.safetensors")
    packed = {name.replace("_proj.weight", "_proj.qweight"): value for name, value in weights.items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendError, match=f"already quantised by {words}, .*give the unquantised model"):
        registry.check_model(backend, ModelSpec(folder), LORA)
    with pytest.raises(BackendError, match=f"already quantised by {words}"):
        ModelFolder.open(folder).lora_modules(LORA)


# how older tools and other makers say it: a file beside config.json, another key, what a weight is called, the words
FORMS: dict[str, tuple[str | None, dict[str, Any], str, str]] = {
    "GPTQ's own file": ("quantize_config.json", {}, "qweight", "GPTQ"),
    "GPTQ by its tensors": (None, {}, "g_idx", "GPTQ"),
    "AWQ's own file": ("quant_config.json", {}, "qweight", "AWQ"),
    "AWQ by its tensors": (None, {}, "qweight", "AWQ"),
    "ModelOpt's own file": ("hf_quant_config.json", {}, "weight_scale", "ModelOpt"),
    "FP8 by its tensors": (None, {}, "weight_scale", "FP8"),
    "FP8 in blocks by its tensors": (None, {}, "weight_scale_inv", "FP8"),
    "compressed-tensors by its tensors": (None, {}, "weight_packed", "compressed-tensors"),
    "an older key": (None, {"compression_config": {"format": "pack-quantized"}}, "scale", "compressed-tensors"),
    "no method": (None, {"quantization_config": {"bits": 4}}, "qweight", "AWQ"),
}


def packed_otherwise(folder: Path, form: str) -> Path:
    """A model whose projections have another tensor beside them, or in their place, as the form has it."""
    file, settings, tensor, _ = FORMS[form]
    tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    if file:
        (folder / file).write_text(json.dumps({"bits": 4}))
    weights, alone = load_file(folder / "model.safetensors"), tensor in ("qweight", "weight_packed")
    layers = [name.removesuffix(".weight") for name in weights if "_proj." in name]
    kept = {name: value for name, value in weights.items() if not (alone and "_proj." in name)}
    added = {f"{layer}.{tensor}": np.ones((64, 64), np.int32) for layer in layers}
    save_file(kept | added, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_other_ways_to_say_that_weights_are_quantised_are_read(form: str, tmp_path: Path) -> None:
    folder, method = packed_otherwise(tmp_path, form), FORMS[form][-1]
    instead = {"torch": "whose name ends in -bnb-4bit", "mlx": "its 4-bit repository of mlx-community"}
    for backend, words in instead.items():
        with pytest.raises(
            BackendError, match=f"already quantised by {method}, .*unquantised model.*{words}"
        ) as caught:
            registry.check_model(backend, ModelSpec(folder), LORA)
        assert "\n" not in str(caught.value) and "download" not in str(caught.value)


def test_a_settings_file_that_was_left_over_beside_plain_weights_refuses_nothing(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "quantize_config.json").write_text("{}")
    for backend in ("torch", "mlx"):
        registry.check_model(backend, ModelSpec(folder), LORA)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, r"Conv1D\), which is not adapted here"),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "its blocks are called transformer.h.N"),
    ],
)
def test_a_model_without_layers_to_adapt_says_why(kind: str, settings: dict, words: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=128, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=words):
        ModelFolder.open(tmp_path).lora_modules(LORA)


def test_experts_that_mlx_packed_are_whole_in_all_their_dimensions(tmp_path: Path) -> None:
    base = published("qwen3_moe", tmp_path / "base")
    (base / "config.json").write_text(json.dumps(ModelFolder.open(base).config))  # with the names that mlx-lm reads
    quantised(base, tmp_path / "packed", {})
    folder = ModelFolder.open(tmp_path / "packed")
    experts = "model.layers.0.mlp.switch_mlp.up_proj"
    assert experts in folder.packed and folder.whole_shapes[f"{experts}.weight"] == (4, 32, 64)


def packed_by_bitsandbytes(base: Path, target: Path) -> Path:
    """The folder as transformers saves it in 4 bits, nested models whole."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    nested = "text_config" in json.loads((base / "config.json").read_text())
    auto = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    auto.from_pretrained(base, quantization_config=settings, dtype=torch.float32).save_pretrained(target)
    return target


def test_a_folder_that_bitsandbytes_packed_is_trained_as_it_is(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    packed_by_bitsandbytes(base, tmp_path / "packed")
    assert ModelFolder.open(tmp_path / "packed").lora_modules(LORA) == ModelFolder.open(base).lora_modules(LORA)
    ours, packed = (
        Case("torch", folder, quantize).open() for folder, quantize in ((base, "4bit"), (tmp_path / "packed", "none"))
    )
    assert packed.scheme == ours.scheme == "nf4/64 double"
    np.testing.assert_allclose(packed.score(BATCH).logprob, ours.score(BATCH).logprob, atol=1e-5)
    assert packed.step([BATCH], 1e-2).loss == pytest.approx(ours.step([BATCH], 1e-2).loss, rel=1e-5)
    with pytest.raises(BackendError, match=r"already quantised by bitsandbytes, which MLX.*use another backend"):
        registry.check_model("mlx", ModelSpec(tmp_path / "packed"), LORA)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", "granite4_h"])
def test_the_adapter_of_a_folder_that_bitsandbytes_packed_is_written_for_both_libraries(
    name: str, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base") if name == "llama" else published(name, tmp_path / "base")
    packed = packed_by_bitsandbytes(base, tmp_path / "packed")
    ours = written(packed, tmp_path / "adapter")
    np.testing.assert_allclose(in_peft(packed, tmp_path / "adapter"), ours, atol=1e-4)
    written(base, tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapters.safetensors"):
        found, expected = (load_file(tmp_path / folder / file) for folder in ("adapter", "plain"))
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert {one.library: one.fits for one in loadings(tmp_path / "adapter", ModelFolder.open(packed))}["PEFT"]
