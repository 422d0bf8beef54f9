"""Which models llama.cpp computes as transformers does, and what a GGUF file must say of them.

Measured on tiny models of every family, against transformers: tests/unit/export/test_families.py. What was not
measured, or is wrong there in silence, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.errors import EnvironmentProblem
from finetune.export.packages import optional

Keys = dict[str, Any]  # of a GGUF file: bool, int, float, str or a list of them
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# setting of transformers' config -> key of the file
_USUAL = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
}
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


@dataclass(frozen=True)
class _Kind:
    architecture: str  # GGUF's name
    permuted: bool = False  # rotary pairs are neighbours there, and halves of a head in transformers
    norm_shift: float = 0.0  # Gemma stores its norms' weights minus 1
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    head: bool = False  # llama.cpp does not load it without an output matrix of its own
    whole_heads: bool = False  # llama.cpp takes hidden size / heads as the size of a head
    ropes: tuple[str, ...] = ()  # scalings of rotary positions that it computes, beside the linear one
    blocks: tuple[str, ...] = (_FULL,)  # its layer_types, again and again; (): any
    counts: Mapping[str, str] = field(default_factory=dict)  # settings of its own, as in _USUAL
    factors: Mapping[str, str] = field(default_factory=dict)  # and those that are no whole numbers
    largest: int = 0  # blocks of Gemma's 27B model, whose attention llama.cpp scales otherwise


_WINDOW = {"sliding_window": "attention.sliding_window"}
_GEMMA: Keys = {"norm_shift": 1.0, "activation": "gelu_pytorch_tanh", "counts": _WINDOW}
_KINDS = {
    "llama": _Kind("llama", permuted=True, biases=(*_ATTENTION, *_MLP), ropes=("llama3", "yarn")),
    "mistral": _Kind("llama", permuted=True, ropes=("llama3", "yarn"), blocks=()),
    "qwen2": _Kind("qwen2", biases=_ATTENTION[:3], ropes=("yarn",)),
    "qwen3": _Kind("qwen3", ropes=("yarn",)),
    "gemma2": _Kind("gemma2", blocks=(_SLIDING, _FULL), factors=_CAPS, largest=46, **_GEMMA),
    "gemma3_text": _Kind("gemma3", blocks=(*[_SLIDING] * 5, _FULL), largest=62, **_GEMMA),
    "phi3": _Kind("phi3", whole_heads=True, blocks=()),
    "olmo2": _Kind("olmo2", head=True, whole_heads=True, ropes=("yarn",)),
    "smollm3": _Kind("smollm3", permuted=True, ropes=("yarn",)),
    "granite": _Kind("granite", permuted=True, ropes=("llama3", "yarn"), factors=_GRANITE),
    "lfm2": _Kind("lfm2", blocks=(), counts={"conv_L_cache": "shortconv.l_cache"}),
}


class Refused(EnvironmentProblem):
    """A model or a tokenizer that is not written as GGUF, with the reason and the remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the run's base: {reason}. Write it with --to merged, and use llama.cpp's own converter")


@dataclass(frozen=True)
class Family:
    """How one model is written."""

    architecture: str  # GGUF's name
    keys: Keys
    names: Mapping[str, str]  # tensor of the checkpoint -> tensor of the file; what is missing is not written
    permuted: Mapping[str, int] = field(default_factory=dict)  # module's last name -> its heads
    norm_shift: float = 0.0
    factors: FloatArray | None = None  # [head size / 2] what each rotary frequency is divided by

    def converted(self, name: str, tensor: FloatArray) -> FloatArray:
        """A tensor of the checkpoint as the file holds it. [out, in], [out]; also `lora_B` [out, r] of a module."""
        if tensor.ndim == 3:  # a convolution of each channel by itself
            return tensor[:, 0]
        if heads := self.permuted.get(name.rsplit(".", 2)[-2]):  # rows of each head from two halves to pairs
            pairs = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2)
            return np.ascontiguousarray(pairs.reshape(tensor.shape))
        return tensor + np.float32(self.norm_shift) if name.endswith("norm.weight") and self.norm_shift else tensor


def family_of(folder: ModelFolder) -> Family:
    """Raises Refused for a model that cannot be written exactly."""
    name = folder.config.get("model_type")
    kind = _KINDS.get(str(name))
    if "vision_config" in folder.config or "audio_config" in folder.config:
        raise Refused(f"{name} reads more than text, and GGUF is written for text models alone")
    if any("expert" in key and value for key, value in folder.text_config.items()):
        raise Refused(f"{name} is a mixture of experts, which is not written as GGUF")
    if kind is None:
        raise Refused(f"model_type {name!s:.60} is not written as GGUF; these are: {', '.join(sorted(_KINDS))}")
    if "auto_map" in folder.config:
        raise Refused("the model comes with code of its own, which llama.cpp does not run")
    config = _config(folder)
    _check(kind, config)
    rope, factors = _rotary(kind, config)
    keys = {f"{kind.architecture}.{key}": value for key, value in (_keys(kind, config, folder) | rope).items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if kind.permuted else {}
    return Family(kind.architecture, keys, _names(folder, kind, config), heads, kind.norm_shift, factors)


def _config(folder: ModelFolder) -> Any:
    """The config with every default that transformers gives it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises any kind here
        raise Refused(f"transformers cannot read config.json ({error!s:.200})") from None


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check(kind: _Kind, config: Any) -> None:
    """Raises Refused for a setting that llama.cpp does not know, or takes as another."""
    name, layers, size = config.model_type, config.num_hidden_layers, _head_size(config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", kind.activation)
    if activation not in (kind.activation, {"silu": "swish"}.get(kind.activation)):
        raise Refused(f"its activation is {activation}, and llama.cpp computes {kind.activation} for {name}")
    if getattr(config, "use_bidirectional_attention", None):
        raise Refused("its tokens also look at later ones, which llama.cpp does not compute for it")
    positions = (1, 1, 1, 0) if name == "smollm3" else ()
    for setting, pattern in (("layer_types", kind.blocks), ("no_rope_layers", positions)):
        values = list(getattr(config, setting, None) or []) if pattern else []
        if values != [pattern[i % len(pattern)] for i in range(len(values))]:
            raise Refused(
                f"{setting} is not {', '.join(map(str, pattern))} again and again, as llama.cpp takes it to be"
            )
    if kind.largest:
        usual = config.hidden_size // config.num_attention_heads if layers == kind.largest else size
        if config.query_pre_attn_scalar != usual:
            raise Refused(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {usual}")
        if any(bool(getattr(config, cap)) != bool(kind.factors) for cap in _CAPS):
            raise Refused("its logits are capped otherwise than llama.cpp does it")
    if kind.whole_heads and size * config.num_attention_heads != config.hidden_size:
        raise Refused(f"head_dim {size} is not hidden_size / heads, as llama.cpp takes it to be for {name}")
    if kind.head and config.tie_word_embeddings:
        raise Refused(f"tie_word_embeddings is set, and llama.cpp wants an output matrix for {name}")


def _keys(kind: _Kind, config: Any, folder: ModelFolder) -> Keys:
    size, context = _head_size(config), int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window and _FULL not in (getattr(config, "layer_types", None) or []):
        context = min(context, int(window))  # not computed there: up to so many tokens it changes nothing
    keys: Keys = {key: getattr(config, setting) for setting, key in (_USUAL | dict(kind.counts)).items()}
    keys |= {key: float(getattr(config, setting)) for setting, key in kind.factors.items()}
    keys |= {"context_length": context, "attention.key_length": size, "attention.value_length": size}
    eps = config.norm_eps if config.model_type == "lfm2" else config.rms_norm_eps
    keys["attention.layer_norm_rms_epsilon"] = float(eps)
    if config.model_type == "lfm2":  # blocks without attention have no heads; the config may not tell its true width
        heads = [config.num_key_value_heads if block == _FULL else 0 for block in config.layer_types]
        width = folder.whole_shapes["model.layers.0.feed_forward.w1.weight"][0]
        keys |= {"attention.head_count_kv": heads, "feed_forward_length": width}
    return keys


def _rotary(kind: _Kind, config: Any) -> tuple[Keys, FloatArray | None]:
    """Keys of the rotary embedding, and the factors of Llama 3."""
    rope, keys, size = dict(config.rope_parameters), Keys(), _head_size(config)
    if _FULL in rope:
        local, rope = rope[_SLIDING], rope[_FULL]
        if local.get("rope_type", "default") != "default":
            raise Refused("its local rotary embedding is scaled")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    scaling = rope.get("rope_type", "default")
    part = float(rope.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and config.model_type != "phi3":
        raise Refused(f"partial_rotary_factor is {part}, which was not measured for {config.model_type}")
    if scaling not in ("default", "linear", *kind.ropes):
        raise Refused(f"rope_type {scaling} was not measured for {config.model_type}, or llama.cpp does not compute it")
    keys |= {"rope.dimension_count": int(size * part), "rope.freq_base": float(rope["rope_theta"])}
    if scaling == "llama3":
        return keys, _llama3_factors(rope, size)
    if scaling != "default":
        keys |= {"rope.scaling.type": scaling, "rope.scaling.factor": float(rope["factor"])}
    return keys | (_yarn(config, rope) if scaling == "yarn" else {}), None


def _yarn(config: Any, rope: Mapping[str, Any]) -> Keys:
    odd = [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    if odd or rope.get("truncate") is False:
        raise Refused(f"yarn with {odd[0] if odd else 'truncate: false'} is not written as GGUF")
    usual = 0.1 * math.log(rope["factor"]) + 1.0  # what llama.cpp multiplies by
    before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return {
        "rope.scaling.original_context_length": int(before),
        "rope.scaling.attn_factor": float(rope.get("attention_factor") or usual) / usual,
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }


def _llama3_factors(rope: Mapping[str, Any], size: int) -> FloatArray:
    """What each frequency is divided by: long waves by `factor`, short ones by 1, between them smoothly."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)  # in tokens
    turns = rope["original_max_position_embeddings"] / waves
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)


def _names(folder: ModelFolder, kind: _Kind, config: Any) -> dict[str, str]:
    """Every tensor's name in the file."""
    gguf = optional("gguf")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name in folder.whole_shapes:
        module, _, what = name.rpartition(".")
        if name.endswith(".rotary_emb.inv_freq") or (module == "lm_head" and config.tie_word_embeddings):
            continue  # computed, and stored by old versions of transformers; or the embedding again
        written = table.get_name(module)
        there = what == "weight" or (what == "bias" and module.rsplit(".", 1)[-1] in kind.biases)
        if written is None or not there:
            raise Refused(f"llama.cpp has no place for its tensor {name:.120}")
        names[name] = f"{written}.{what}"
    return names
