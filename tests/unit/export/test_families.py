"""llama.cpp computes what transformers does, for every family that is promised; what it does not is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from backends.model_folder import ModelFolder
from finetune.errors import EnvironmentProblem
from finetune.export import gguf_file
from finetune.export.families import Family, family_of
from tests.tiny_families import MODELS, published
from tests.tiny_models import FAMILIES, family, model_with_tokenizer
from tests.unit.export.gguf_models import distance, expected, model, write

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "block_ff_dim": 128}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "wide heads with norms": ("qwen3", {"head_dim": 32}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama3 rope with its scales": ("granite", {"rope_parameters": LLAMA3}),
    "linear in both kinds of blocks": ("gemma2", {"rope_parameters": LINEAR}),
    "yarn beside no position": ("smollm3", {"rope_parameters": YARN}),
    "yarn with norms": ("qwen3", {"rope_parameters": YARN}),
    "linear rope": ("granite", {"rope_parameters": LINEAR}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn with its own factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16}}),
    "yarn without permutation": ("olmo2", {"rope_parameters": YARN}),
    "theta": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "partial rotary": ("phi3", {"rope_parameters": HALF}),
    "padded vocabulary": ("llama", {"vocab_size": 384}),
    "local theta, global scale": ("gemma3_text", {"rope_parameters": GEMMA3_ROPE}),
    "short convolutions": ("lfm2", LFM2),
    "short convolutions, linear rope": ("lfm2", LFM2 | {"rope_parameters": LINEAR}),
    "short convolutions, longer": ("lfm2", LFM2 | {"conv_L_cache": 4, "layer_types": ["full_attention", "conv"]}),
    "without position in every fourth": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_gives_the_log_probabilities_of_transformers(variant: str, tokenizer: Path, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    folder = model(name, tmp_path / "model", tokenizer, **settings)
    write(folder, tmp_path / "model.gguf")
    bound = 2e-3 if name.startswith("gemma") else 1e-5  # GELU is a table of 16 bits there
    assert distance(tmp_path / "model.gguf", expected(folder)) < bound


def _other_theta(right: Family) -> Family:
    return dataclasses.replace(right, keys=right.keys | {f"{right.architecture}.rope.freq_base": 1e4})


FAULTS = {
    "no permutation": ("smollm3", {}, lambda right: dataclasses.replace(right, permuted={})),
    "keys not permuted": ("granite", {}, lambda right: dataclasses.replace(right, permuted={"q_proj": 4})),
    "no norm shift": ("gemma2", {}, lambda right: dataclasses.replace(right, norm_shift=0.0)),
    "another theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, _other_theta),
    "no factors": ("llama", {"rope_parameters": LLAMA3}, lambda right: dataclasses.replace(right, factors=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings, damaged = FAULTS[fault]
    folder = model(name, tmp_path / "model", tokenizer, **settings)
    monkeypatch.setattr(gguf_file, "family_of", lambda opened: damaged(family_of(opened)))
    write(folder, tmp_path / "model.gguf")
    assert distance(tmp_path / "model.gguf", expected(folder)) > 0.01


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "smollm3, another pattern": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "smollm3, position everywhere": ("smollm3", {"no_rope_layers": [1] * 4, "num_hidden_layers": 4}, "no_rope"),
    "gemma2, another scale": ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
    "gemma3, another scale": ("gemma3_text", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"),
    "gemma3, another pattern": ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "layer_types"),
    "gemma3, attention both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "later ones"),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None}, "capped"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "activation"),
    "biases without a place": ("qwen3", {"attention_bias": True}, "no place for its tensor"),
    "dynamic rope": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "dynamic"),
    "llama3 rope elsewhere": ("qwen3", {"rope_parameters": LLAMA3}, "llama3 was not measured for qwen3"),
    "yarn in gemma": ("gemma2", {"rope_parameters": YARN}, "yarn was not measured for gemma2"),
    "sliding windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "layer_types is not full_attention",
    ),
    "a tied head": ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "another family": ("gpt_neox", {}, "model_type gpt_neox"),
    "gemma, the first": ("gemma", {"head_dim": 16}, "model_type gemma"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4", "granite4_h", "gpt_oss"])
def test_models_that_are_not_written_are_refused_as_their_makers_publish_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=MODELS[name][0] + ".* with --to merged, and use llama.cpp's own"):
        family_of(ModelFolder.open(published(name, tmp_path)))


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    name, settings, reason = REFUSED[case]
    folder = ModelFolder.open(family(name, tmp_path, **settings))
    with pytest.raises(EnvironmentProblem, match=reason) as refusal:
        family_of(folder)
    assert "--to merged" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                              "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}}, "longrope"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"vision_config": {"hidden_size": 8}}, "more than text"),
        ({"model_type": "made_up"}, "made_up"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "code"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale"),
        ({"rope_parameters": HALF}, "partial"),
    ],
)  # fmt: skip
def test_a_config_that_says_more_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = family("llama", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(EnvironmentProblem, match=reason):
        family_of(ModelFolder.open(tmp_path, remote_code=True))


def test_a_window_that_is_not_computed_bounds_the_context(tmp_path: Path) -> None:
    folder = ModelFolder.open(family("mistral", tmp_path, sliding_window=32))
    assert family_of(folder).keys["llama.context_length"] == 32
