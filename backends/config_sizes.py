"""Sizes read from a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.predictions import Recurrence


def answering_bytes(config: Mapping[str, Any], number: int) -> int:
    """Of one token of a prompt or its answer: keys and values in all blocks, and what a block makes on the way."""
    heads, hidden = number_of(config, "num_attention_heads", 1), number_of(config, "hidden_size", 1)
    keys = number_of(config, "num_key_value_heads", heads) * number_of(config, "head_dim", hidden // heads)
    made = 4 * number_of(config, "intermediate_size", 4 * hidden) + 6 * hidden
    return (2 * number_of(config, "num_hidden_layers", 1) * keys + made) * number


def recurrence_of(text: Mapping[str, Any]) -> Recurrence | None:
    """Of a config with linear attention in some blocks (Qwen3.5, Qwen3-Next)."""
    names = ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")
    heads, key_heads, keys, values = (number_of(text, f"linear_{name}", 0) for name in names)
    blocks, every = number_of(text, "num_hidden_layers", 1), number_of(text, "full_attention_interval", 4)
    kinds = text.get("layer_types")
    count = kinds[:blocks].count("linear_attention") if isinstance(kinds, list) else blocks - blocks // every
    return Recurrence(count, heads, key_heads, keys, values) if min(heads, key_heads, keys, values, count) else None


def number_of(config: Mapping[str, Any], key: str, default: int) -> int:
    """Where layers differ, the largest."""
    value = config.get(key)
    if isinstance(value, list):
        value = max(value, default=None)
    return value if isinstance(value, int) and value > 0 else default
