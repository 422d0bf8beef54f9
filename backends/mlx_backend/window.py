"""Sliding windows that a config asks for and mlx-lm's model leaves out: up to the window both are the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from backends.interface import BackendError


def ignored_window(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """The tokens that a row may have, where mlx-lm lets every query see every earlier key and transformers does not.

    mlx-lm's models that know windows have other caches than plain ones (in 0.32 not so Mistral, Mixtral, Gemma 2,
    Phi 3, Starcoder 2, Qwen 2 and 3).
    """
    window = config.get("sliding_window")
    switch = config.get("use_sliding_window", not str(config.get("model_type")).startswith("qwen"))
    kinds = config.get("layer_types") or ["sliding_attention"]
    if not window or not switch or config.get("model_type") == "llama" or "sliding_attention" not in kinds:
        return None
    return int(window) if all(type(cache) is KVCache for cache in make_prompt_cache(model)) else None


def check_window(tokens: int, window: int | None) -> None:
    """Raises BackendError where a row of so many tokens is longer than an ignored window."""
    if window is not None and tokens > window:
        raise BackendError(
            f"a row of {tokens} tokens is longer than this model's sliding window of {window}, which mlx-lm leaves "
            f"out; set train.max_length to at most {window}, or use backend: torch"
        )
