"""The blocks' norms and gated layers with hand-written gradients, so that less is saved for the backward pass."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from backends.predictions import DELTA_RULE
from backends.torch_backend.costs import DELTA_KERNEL, GATED_LAYERS, NORMS, ROTARY
from backends.torch_backend.gated import ACTIVATIONS, Activation
from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.norms import use_own_norm
from backends.torch_backend.patch import is_coded_as
from backends.torch_backend.rotary import use_own_rotary

_DELTA_RULE = "torch_chunk_gated_delta_rule"  # the function, in transformers' module of each model that has it


def use_own_layers(model: Any) -> list[str]:
    """Modules whose code is known, whatever their name, get our own gradients. Returns the kinds."""
    activations, replaced = {type(ACT2FN[name]): name for name in ACTIVATIONS}, set()
    for module in model.modules():
        if use_own_norm(module):
            replaced.add(NORMS)
        elif (
            is_coded_as(module, LlamaMLP)
            and (activation := activations.get(type(module.act_fn)))
            and isinstance(module.down_proj, LoraLinear)  # a frozen one saves little as it is
        ):
            module.forward = partial(_gated_layer, module, ACTIVATIONS[activation])
            replaced.add(GATED_LAYERS)
    return [*sorted(replaced, reverse=True), *([ROTARY] if use_own_rotary(model) else [])]


def delta_rule_of(model: Any) -> list[str]:
    """Which form of the gated delta rule transformers runs in this model: a library's kernels, or its own in chunks."""
    homes = {type(module).__module__ for module in model.modules()}
    if not any(hasattr(sys.modules.get(home), _DELTA_RULE) for home in homes):
        return []
    return [DELTA_KERNEL if find_spec("fla") else DELTA_RULE]


def _gated_layer(module: Any, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    down: LoraLinear = module.down_proj
    return down.gated(activation, module.gate_proj(x), module.up_proj(x))
