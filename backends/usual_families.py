"""Model families whose layers are known from config and tensor headers alone, so that no library is imported.

That is so for the usual Llama-like families in their usual form (tests/conformance/test_usual_families.py compares them
with what the libraries build). Of any other model, and of a config with a key that is not known here, the libraries are
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backends.interface import CheckedFolder

EXAMPLE = "Qwen/Qwen3-4B-Instruct-2507"  # a model that every backend trains, and starting recipes have
OTHER_MODEL = f"choose another model, such as {EXAMPLE}"

# model_type -> what its blocks have beside the norms and the seven layers of all
_FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": (),
    "smollm3": (),
    "qwen2": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "qwen3": ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
}
_ATTENTION = {"full_attention", "sliding_attention"}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _tokens(value: Any) -> bool:
    return all(type(one) is int for one in (value if isinstance(value, list) else [value] if value is not None else []))


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


# Every key that such a config may have, and what may stand there. Other values may mean another computation, or that
# a library refuses the model.
_NEEDED: dict[str, Callable[[Any], bool]] = dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), _whole
)
_MAY: dict[str, Callable[[Any], bool]] = _NEEDED | {
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "max_window_layers"), _whole),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range"), _number),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"), _tokens),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), _only(False)),
    **dict.fromkeys(("tie_word_embeddings", "use_cache"), _only(True, False)),
    **dict.fromkeys(("transformers_version", "_name_or_path", "_model_name_or_path"), lambda value: type(value) is str),
    **dict.fromkeys(("dtype", "torch_dtype"), _only("float32", "bfloat16", "float16", None)),
    "model_type": lambda value: value in _FAMILIES,
    "architectures": lambda value: isinstance(value, list) and all(type(one) is str for one in value),
    "attention_dropout": _only(0.0, 0),
    "hidden_act": _only("silu"),
    "pretraining_tp": _only(1),
    "rope_scaling": _only(None),
    "rope_parameters": lambda value: (
        isinstance(value, dict)
        and value.get("rope_type") == "default"
        and set(value) <= {"rope_type", "rope_theta"}
        and _number(value.get("rope_theta", 1.0))
    ),
    "sliding_window": lambda value: value is None or _whole(value),
    "layer_types": lambda value: isinstance(value, list) and {*map(str, value)} <= _ATTENTION,
    "no_rope_layers": lambda value: isinstance(value, list) and all(type(one) is int for one in value),
    "no_rope_layer_interval": _whole,
}


def is_plain(folder: CheckedFolder) -> bool:
    """Whether the folder's tensors are those of its config's family, each of the shape that the config says."""
    config = folder.written
    if folder.remote_code or not folder.weights or not _NEEDED.keys() <= config.keys():
        return False
    if not all(key in _MAY and _MAY[key](value) for key, value in config.items()):
        return False
    heads = config["num_attention_heads"]
    blocks = {len(config[key]) for key in ("layer_types", "no_rope_layers") if config.get(key) is not None}
    fitting = config["hidden_size"] % heads == 0 and blocks <= {config["num_hidden_layers"]}
    return fitting and _named_as_usual(config, folder.shapes)


def _named_as_usual(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    width = config.get("head_dim", hidden // heads)
    queries, keys = heads * width, config.get("num_key_value_heads", heads) * width
    block: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(_NORMS, (hidden,)),
        "self_attn.q_proj.weight": (queries, hidden), "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden), "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    for name in _FAMILIES[config["model_type"]]:
        layer, _, part = name.rpartition(".")
        block[name] = (width,) if part == "weight" else block[f"{layer}.weight"][:1]
    wanted: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    wanted |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if config.get("tie_word_embeddings") is not True:
        wanted["lm_head.weight"] = (config["vocab_size"], hidden)
    return wanted == {name: tuple(shape) for name, shape in shapes.items()}
