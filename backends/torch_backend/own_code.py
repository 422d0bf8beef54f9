"""Replaces code of a loaded model's modules, and checks that the model computes what it did before."""

from __future__ import annotations

from typing import Any

import torch

from backends.torch_backend.attention import expand_heads, use_tiles
from backends.torch_backend.layers import delta_rule_of, use_own_layers

_SAMPLE = ((1, 5, 2, 7, 3, 0, 4, 6), (3, 3, 0, 2, 1, 1, 6, 5))  # several positions: the first is not turned


def use_own_code(model: Any) -> list[str]:
    """Returns what is computed in another way for it."""
    shortcuts = [*use_own_layers(model), *use_tiles(model), *delta_rule_of(model)]
    expand_heads(model)
    return shortcuts


def use_checked_own_code(model: Any) -> list[str]:
    """The same; a model that then computes something else keeps all its own code."""
    before = {id(module) for module in model.modules() if "forward" in vars(module)}
    attention, expected = model.config._attn_implementation, _states(model)
    shortcuts = use_own_code(model)
    if agree(_states(model), expected, model.dtype):
        return shortcuts
    for module in model.modules():
        if "forward" in vars(module) and id(module) not in before:
            del module.forward
    model.set_attn_implementation(attention)
    return delta_rule_of(model)


def agree(ours: torch.Tensor, theirs: torch.Tensor, number_type: torch.dtype) -> bool:
    """Whether both are the same, but for the rounding of a model that computes in this type."""
    near = {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(number_type, 1e-4)
    return bool((ours - theirs).float().norm() <= near * theirs.float().norm())


def _states(model: Any) -> torch.Tensor:
    """What the model makes of the sample, before its head. [B, T, D]"""
    tokens = torch.tensor(_SAMPLE) % model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        states: torch.Tensor = model.base_model(input_ids=tokens.to(model.device), use_cache=False)[0]
    return states
