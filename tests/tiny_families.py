"""Tiny random folders of models that their makers publish inside another, or under other names than libraries have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

Config = dict[str, Any]

_TEXT: Config = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# more blocks than the text model has, and layers of the same names
_EYES: Config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYES: Config = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_IMAGES = {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "position_embedding_type": "nope",
}
_GPT_OSS = (
    _TEXT
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    | {"layer_types": ["sliding_attention", "full_attention"]}
)
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_GLM_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_GEMMA4 = {
    "vision_config": _EYES | {"num_key_value_heads": 2, "head_dim": 16},
    "audio_config": None,
    "image_token_id": 127,
    "boi_token_id": 126,
    "eoi_token_id": 125,
    "audio_token_id": 124,
    "boa_token_id": 123,
    "eoa_token_index": 122,
    "video_token_id": 121,
}
_NO_EXPERTS = {"shared_intermediate_size": 128, "num_local_experts": 0, "num_experts_per_tok": 0}

# name -> (model_type, config)
MODELS: dict[str, tuple[str, Config]] = {
    "gemma3": (
        "gemma3",
        {
            "text_config": _TEXT | {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 64},
            "vision_config": _EYES,
            "mm_tokens_per_image": 4,
            **_IMAGES,
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
            "vision_config": _EYES | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 127,
        },
    ),
    "ministral3": (
        "mistral3",
        {
            "text_config": _TEXT | {"model_type": "ministral3"},
            "vision_config": _EYES | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 127,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": _TEXT,
            "vision_config": _QWEN_EYES | {"deepstack_visual_indexes": [0]},
            "image_token_id": 127,
            "video_token_id": 126,
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            "text_config": _TEXT | _LINEAR_ATTENTION | {"num_hidden_layers": 4, "tie_word_embeddings": True},
            "vision_config": _QWEN_EYES,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        _TEXT | _LINEAR_ATTENTION | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_saved": (  # its experts one by one, as transformers 5 writes them
        "qwen3_5_moe",
        {
            "text_config": _TEXT
            | _LINEAR_ATTENTION
            | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            | {"shared_expert_intermediate_size": 32},
            "vision_config": _QWEN_EYES,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", _TEXT | _LINEAR_ATTENTION | {"num_hidden_layers": 4}),
    "gemma4": (
        "gemma4",
        {
            "text_config": _TEXT
            | {
                "num_hidden_layers": 6,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 128,
                "num_kv_shared_layers": 2,
                "sliding_window": 64,
            },
            **_GEMMA4,
        },
    ),
    "gemma4_e2b": (
        "gemma4",
        _GEMMA4
        | {
            "text_config": _TEXT
            | {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 128,
                "num_kv_shared_layers": 2,
                "use_double_wide_mlp": True,
                "sliding_window": 64,
            },
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 5,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [8, 4],
                "output_proj_dims": 32,
            },
        },
    ),
    "gemma4_moe": (
        "gemma4",
        _GEMMA4
        | {
            "text_config": _TEXT
            | {
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
                "sliding_window": 64,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
            }
        },
    ),
    "granite4": (
        "granitemoehybrid",
        _TEXT | _NO_EXPERTS | {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
    ),
    "granite4_h": ("granitemoehybrid", _TEXT | _NO_EXPERTS | _MAMBA | {"layer_types": ["mamba", "attention"]}),
    "granite4_h_moe": (
        "granitemoehybrid",
        _TEXT
        | _MAMBA
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 128},
    ),
    "lfm2": ("lfm2", _TEXT | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "block_ff_dim": 128}),
    "olmo3": ("olmo3", _TEXT | {"num_hidden_layers": 4, "sliding_window": 64}),
    "qwen3_moe": (
        "qwen3_moe",
        _TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "qwen3_next": (
        "qwen3_next",
        _TEXT
        | _LINEAR_ATTENTION
        | _EXPERTS
        | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "text_config": _TEXT
            | _LINEAR_ATTENTION
            | _EXPERTS
            | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
            "vision_config": _QWEN_EYES,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        _TEXT
        | _EXPERTS
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "time_step_min": 0.3,  # so long that it matters
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {key: value for key, value in _TEXT.items() if key != "head_dim"}
        | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
        | {"moe_intermediate_size": 32},
    ),
    "glm4_moe": ("glm4_moe", _TEXT | _EXPERTS | _GLM_EXPERTS),
    "glm4_moe_lite": ("glm4_moe_lite", _TEXT | _EXPERTS | _GLM_EXPERTS | _LATENT_ATTENTION),
    "gpt_oss": ("gpt_oss", _GPT_OSS),  # as transformers writes it; its makers publish the next one
    "gpt_oss_mxfp4": ("gpt_oss", _GPT_OSS),
}


def published(name: str, folder: Path, seed: int = 0, as_saved: bool = False) -> Path:
    """The folder of one of MODELS, as its makers write config and weights.

    as_saved: with the config as transformers 5 writes it, under its own names.
    """
    kind, settings = MODELS[name]
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        except ValueError:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        spread(model)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        if name in MAKERS_CONFIGS and not as_saved:
            file = folder / "config.json"
            written: Config = json.loads(file.read_text())
            MAKERS_CONFIGS[name](written)
            file.write_text(json.dumps(written))
        if name == "qwen3_5":
            _with_a_head_for_more_tokens(folder)
        if name == "qwen3_5_moe":
            _with_experts_in_one(folder)
        if name == "gpt_oss_mxfp4":
            _with_packed_experts(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    """Random weights that keep activations about unit size, so that every layer matters to the logits."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)


def _with_a_head_for_more_tokens(folder: Path) -> None:
    """A block `mtp.layers.0` beside the model's own, as Qwen3.5 has it."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    last = "model.language_model.layers.3."
    block = {f"mtp.layers.0.{n.removeprefix(last)}": t.clone() for n, t in weights.items() if n.startswith(last)}
    save_file(weights | block | {"mtp.fc.weight": torch.randn(64, 128)}, file, metadata={"format": "pt"})


def _with_experts_in_one(folder: Path) -> None:
    """All experts of a block in one tensor, gate and up together, as Qwen3.5 has them."""
    file, rest = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for before in {name.partition(".experts.")[0] for name in rest if ".experts." in name}:
        experts = [
            [rest.pop(f"{before}.experts.{number}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for number in range(4)
        ]
        rest[f"{before}.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        rest[f"{before}.experts.down_proj"] = torch.stack([down for *_, down in experts])
    save_file(rest, file, metadata={"format": "pt"})


def _with_packed_experts(folder: Path) -> None:
    """Experts in MXFP4 (two weights in a byte, 32 to a scale), as gpt-oss has them."""
    import mlx.core as mx

    file, packed = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = tensor
            continue
        words, scales = mx.quantize(mx.array(tensor.mT.contiguous().numpy()), 32, 4, mode="mxfp4")
        blocks = words.view(mx.uint8).reshape(*scales.shape, 16)
        packed |= {
            f"{name}_blocks": torch.from_numpy(np.array(blocks)),
            f"{name}_scales": torch.from_numpy(np.array(scales)),
        }
    save_file(packed, file, metadata={"format": "pt"})
    config = folder / "config.json"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))


def _granite(config: Config) -> None:
    kinds = {"full_attention": "attention", "linear_attention": "mamba"}
    config["layer_types"] = [kinds.get(kind, kind) for kind in config["layer_types"]]


def _gemma4(config: Config) -> None:
    del config["text_config"]["per_layer_config"]
    config["text_config"]["global_head_dim"] = 32


def _lfm2(config: Config) -> None:
    config |= {"block_dim": 64, "conv_dim": 64, "full_attn_idxs": [1]}


# where makers' configs and those that transformers saves differ
MAKERS_CONFIGS: dict[str, Callable[[Config], None]] = {
    "granite4": _granite,
    "granite4_h": _granite,
    "granite4_h_moe": _granite,
    "gemma4": _gemma4,
    "gemma4_e2b": _gemma4,
    "gemma4_moe": _gemma4,
    "lfm2": _lfm2,
    "qwen3_moe": lambda config: config.update(num_experts=config.pop("num_local_experts")),
}
