"""Rotary position embeddings as GGUF says them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from backends.interface import FloatArray

Keys = dict[str, Any]  # of a GGUF file: bool, int, float, str or a list of them


# rope_type -> the families that llama.cpp computes it for; default and linear: all of them
_MEASURED = {
    "llama3": ("llama", "mistral", "granite"),
    "yarn": ("llama", "mistral", "granite", "qwen2", "qwen3", "olmo2", "smollm3"),
}


class Refused(Exception):
    """The reason why a model or a tokenizer is not written as GGUF."""


def rotary(config: Any, size: int) -> tuple[Keys, FloatArray | None]:
    """Keys of the rotary embedding, and the factors of Llama 3."""
    rope, keys = dict(config.rope_parameters), Keys()
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise Refused("its local rotary embedding is scaled")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    partial = float(rope.get("partial_rotary_factor") or 1.0)
    if partial != 1.0 and config.model_type != "phi3":
        raise Refused(f"partial_rotary_factor is {partial}, which was not measured for {config.model_type}")
    keys |= {"rope.dimension_count": int(size * partial), "rope.freq_base": float(rope["rope_theta"])}
    if kind == "default":
        return keys, None
    if config.model_type not in _MEASURED.get(kind, (config.model_type,)):
        raise Refused(f"rope_type {kind} was not measured for {config.model_type}, or llama.cpp does not compute it")
    if kind == "llama3":
        return keys, _llama3_factors(rope, size)
    if kind not in ("linear", "yarn"):
        raise Refused(f"rope_type {kind} is not written as GGUF; default, linear, llama3 and yarn are")
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return keys | (_yarn(config, rope) if kind == "yarn" else {}), None


def _yarn(config: Any, rope: Mapping[str, Any]) -> Keys:
    odd = [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    if odd or rope.get("truncate") is False:
        raise Refused(f"yarn with {odd[0] if odd else 'truncate: false'} is not written as GGUF")
    usual = 0.1 * math.log(rope["factor"]) + 1.0  # what llama.cpp multiplies by
    return {
        "rope.scaling.original_context_length": int(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        ),
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
