"""Which models llama.cpp computes as transformers does, and what a GGUF file must say of them.

Measured on tiny models of every family, against transformers: tests/unit/export/test_families.py. What was not
measured, or is wrong there in silence, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.errors import EnvironmentProblem
from finetune.export.packages import optional
from finetune.export.rotary import Keys, Refused, rotary

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BUFFERS = (".rotary_emb.inv_freq",)  # computed, and stored by old versions of transformers


@dataclass(frozen=True)
class _Kind:
    architecture: str  # GGUF's name
    permuted: bool = False  # rotary pairs are neighbours there, and halves of a head in transformers
    norm_shift: float = 0.0  # Gemma stores its norms' weights minus 1
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    head: bool = False  # llama.cpp does not load it without an output matrix of its own
    whole_heads: bool = False  # llama.cpp takes hidden size / heads as the size of a head


_KINDS = {
    "llama": _Kind("llama", permuted=True, biases=(*_ATTENTION, *_MLP)),
    "mistral": _Kind("llama", permuted=True),
    "qwen2": _Kind("qwen2", biases=_ATTENTION[:3]),
    "qwen3": _Kind("qwen3"),
    "gemma2": _Kind("gemma2", norm_shift=1.0, activation="gelu_pytorch_tanh"),
    "gemma3_text": _Kind("gemma3", norm_shift=1.0, activation="gelu_pytorch_tanh"),
    "phi3": _Kind("phi3", whole_heads=True),
    "olmo2": _Kind("olmo2", head=True, whole_heads=True),
    "smollm3": _Kind("smollm3", permuted=True),
    "granite": _Kind("granite", permuted=True),
    "lfm2": _Kind("lfm2"),
}
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # blocks of the 27B models, whose attention llama.cpp scales otherwise


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
        heads = self.permuted.get(name.rsplit(".", 2)[-2])
        if heads:
            return permuted(tensor, heads)
        return tensor + np.float32(self.norm_shift) if name.endswith("norm.weight") and self.norm_shift else tensor


def permuted(tensor: FloatArray, heads: int) -> FloatArray:
    """Rows of each head from (first half, second half) to pairs, as llama.cpp rotates them. [heads * size, ...]"""
    shape = (heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape))


def family_of(folder: ModelFolder) -> Family:
    """Raises EnvironmentProblem with the reason and the remedy for a model that cannot be written exactly."""
    try:
        return _family(folder)
    except Refused as refused:
        raise EnvironmentProblem(
            f"{folder.path}: {refused}. Write it with --to merged, and use llama.cpp's own converter"
        ) from None


def _family(folder: ModelFolder) -> Family:
    kind_name = folder.config.get("model_type")
    kind = _KINDS.get(str(kind_name))
    if "vision_config" in folder.config or "audio_config" in folder.config:
        raise Refused(f"{kind_name} reads more than text, and GGUF is written for text models alone")
    if any("expert" in key and value for key, value in folder.text_config.items()):
        raise Refused(f"{kind_name} is a mixture of experts, which is not written as GGUF")
    if kind is None:
        raise Refused(f"model_type {kind_name!s:.60} is not written as GGUF; these are: {', '.join(sorted(_KINDS))}")
    if "auto_map" in folder.config:
        raise Refused("the model comes with code of its own, which llama.cpp does not run")
    config = _config(folder)
    _check(str(kind_name), kind, config)
    rope, factors = rotary(config, _head_size(config))
    keys = _sizes(config) | rope | _extras(str(kind_name), config, folder)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if kind.permuted else {}
    names = _names(folder, kind, config)
    whole = {f"{kind.architecture}.{key}": value for key, value in keys.items()}
    return Family(kind.architecture, whole, names, heads, kind.norm_shift, factors)


def _config(folder: ModelFolder) -> Any:
    """The config with every default that transformers gives it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises any kind here
        raise Refused(f"transformers cannot read config.json ({error!s:.200})") from None


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check(name: str, kind: _Kind, config: Any) -> None:
    """Raises Refused for a setting that llama.cpp does not know, or takes as another."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", kind.activation)
    if activation not in (kind.activation, {"silu": "swish"}.get(kind.activation)):
        raise Refused(f"its activation is {activation}, and llama.cpp computes {kind.activation} for {name}")
    if getattr(config, "use_bidirectional_attention", None):
        raise Refused("its tokens also look at later ones, which llama.cpp does not compute for it")
    layers, size = config.num_hidden_layers, _head_size(config)
    kinds = list(getattr(config, "layer_types", None) or [])
    if name == "gemma2" and kinds != [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]:
        raise Refused("its layer_types do not alternate, as llama.cpp takes them to")
    if name == "gemma3_text" and kinds != [
        "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)
    ]:
        raise Refused("not every sixth of its blocks has full attention, as llama.cpp takes it to be")
    if name not in ("gemma2", "gemma3_text") and "sliding_attention" in kinds and name not in ("mistral", "phi3"):
        raise Refused("some of its blocks have a sliding window, which llama.cpp does not compute for it")
    if name == "smollm3" and list(config.no_rope_layers) != [int(i % 4 != 3) for i in range(layers)]:
        raise Refused("no_rope_layers is not every fourth block, and llama.cpp knows no other pattern")
    if name in _LARGEST:
        usual = config.hidden_size // config.num_attention_heads if layers == _LARGEST[name] else size
        if config.query_pre_attn_scalar != usual:
            raise Refused(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {usual}")
        capped = (config.attn_logit_softcapping, config.final_logit_softcapping)
        if (name == "gemma2") != all(capped) or (name == "gemma3_text") == any(capped):
            raise Refused("its logits are capped otherwise than llama.cpp does it")
    if kind.whole_heads and size * config.num_attention_heads != config.hidden_size:
        raise Refused(f"head_dim {size} is not hidden_size / heads, as llama.cpp takes it to be for {name}")
    if kind.head and config.tie_word_embeddings:
        raise Refused(f"tie_word_embeddings is set, and llama.cpp wants an output matrix for {name}")


def _sizes(config: Any) -> Keys:
    size, context = _head_size(config), int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if window and "full_attention" not in kinds:  # not computed there: up to so many tokens it changes nothing
        context = min(context, int(window))
    return {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(
            config.norm_eps if hasattr(config, "norm_eps") else config.rms_norm_eps
        ),
        "vocab_size": config.vocab_size,
    }


def _extras(name: str, config: Any, folder: ModelFolder) -> Keys:
    if name == "granite":
        return {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    if name == "gemma2":
        return {
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": float(config.attn_logit_softcapping),
            "final_logit_softcapping": float(config.final_logit_softcapping),
        }
    if name == "gemma3_text":
        return {"attention.sliding_window": config.sliding_window}
    if name == "lfm2":  # blocks without attention have no heads; the config may not tell how wide the others are
        heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
        return {
            "attention.head_count_kv": heads,
            "shortconv.l_cache": config.conv_L_cache,
            "feed_forward_length": folder.whole_shapes["model.layers.0.feed_forward.w1.weight"][0],
        }
    return {}


def _names(folder: ModelFolder, kind: _Kind, config: Any) -> dict[str, str]:
    """Every tensor's name in the file."""
    gguf = optional("gguf")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name in folder.whole_shapes:
        module, _, what = name.rpartition(".")
        if name.endswith(_BUFFERS) or (module == "lm_head" and config.tie_word_embeddings):
            continue
        written = table.get_name(module)
        if (
            written is None
            or what not in ("weight", "bias")
            or (what == "bias" and module.rsplit(".", 1)[-1] not in kind.biases)
        ):
            raise Refused(f"llama.cpp has no place for its tensor {name:.120}")
        names[name] = f"{written}.{what}"
    return names
