"""A model's config with both the old and the new spelling of keys that libraries disagree on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backends.interface import BackendError

_EXPERTS = ("num_experts", "num_local_experts")
_GRANITE = {"full_attention": "attention", "linear_attention": "mamba"}
_GEMMA = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
# text models that stand alone, which mlx-lm has under the type of the whole
_WHOLE = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
_NUMBERS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def completed(config: dict[str, Any], weights: Iterable[Iterable[str]]) -> dict[str, Any]:
    """A nested config in which both parts say what libraries ask of either: vocabulary, and whether the head is tied.

    A head that has a tensor of its own is not tied.
    """
    config = _with_older_keys({key: _untagged(value) for key, value in config.items()})
    text = config.get("text_config")
    if not isinstance(text, dict):
        kind = config.get("model_type")
        return config | ({"model_type": _WHOLE[kind]} if isinstance(kind, str) and kind in _WHOLE else {})
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if any(name.endswith("lm_head.weight") for shapes in weights for name in shapes):
        tied = False
    said = {} if tied is None else {"tie_word_embeddings": tied}
    known = {"vocab_size": text["vocab_size"]} if "vocab_size" in text else {}
    plain = _with_older_keys({key: _untagged(value) for key, value in text.items()})
    return known | config | said | {"text_config": plain | said}


def _with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """With what transformers 5 leaves out or renames when it writes the config, and mlx-lm 0.32 reads."""
    kind, said = str(config.get("model_type")), dict[str, Any]()
    experts = [config[key] for key in _EXPERTS if config.get(key) is not None]
    if len(experts) == 1:
        said |= dict.fromkeys(_EXPERTS, experts[0])
    kinds = config.get("layer_types")
    if kind == "granitemoehybrid" and isinstance(kinds, list):
        said["layer_types"] = [_GRANITE.get(layer, layer) if isinstance(layer, str) else layer for layer in kinds]
    if kind == "lfm2" and "hidden_size" in config:
        said |= {key: config["hidden_size"] for key in ("block_dim", "conv_dim") if key not in config}
    special = config.get("per_layer_config")
    if kind.startswith("gemma4") and isinstance(special, dict):
        for layer in (layer for layer in special.values() if isinstance(layer, dict)):
            said |= {_GEMMA[key]: value for key, value in layer.items() if key in _GEMMA and _GEMMA[key] not in config}
    return config | said


def _untagged(value: Any) -> Any:
    """A number that transformers writes as an object, {"__float__": "Infinity"}, alone or in a list."""
    if isinstance(value, list):
        return [_untagged(part) if isinstance(part, dict) else part for part in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return _NUMBERS.get(str(value["__float__"]), value)
    return value


def rope_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in the other spelling.

    transformers 5 writes `rope_parameters`; mlx-lm 0.32 reads `rope_theta` and `rope_scaling` and takes
    a default where they are missing, in silence.
    """
    try:
        return legacy_rope(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise BackendError(f"{path}: rope_parameters in config.json are not valid ({error!s:.200})") from None


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The older keys that say what `rope_parameters` says, as mlx-lm 0.32 reads them; for a nested text model too.

    Where layers differ ("full_attention" and "sliding_attention"), mlx-lm reads the second base from
    `rope_local_base_freq` and the pattern from `sliding_window_pattern`.
    """
    text = config.get("text_config")
    nested = {"text_config": text | legacy_rope(text)} if isinstance(text, dict) and legacy_rope(text) else {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return nested
    if "full_attention" in rope:
        keys = _older_keys(rope["full_attention"])
        local = rope.get("sliding_attention", {}).get("rope_theta")
        kinds = config.get("layer_types") or []
        pattern = {"sliding_window_pattern": kinds.index("full_attention") + 1} if "full_attention" in kinds else {}
        return nested | keys | pattern | ({"rope_local_base_freq": local} if local else {})
    return nested | _older_keys(rope)


def _older_keys(rope: dict[str, Any]) -> dict[str, Any]:
    same = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys = {key: rope[key] for key in same if key in rope}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return keys | {"rope_scaling": None if kind == "default" else scaling | {"rope_type": kind, "type": kind}}
