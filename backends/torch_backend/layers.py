"""The blocks' norms and gated layers with hand-written gradients, so that less is saved for the backward pass."""

from __future__ import annotations

import sys
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.utils.import_utils import is_flash_linear_attention_available

from backends.predictions import DELTA_RULE
from backends.torch_backend.costs import DELTA_KERNEL, GATED_LAYERS, NORMS, ROTARY
from backends.torch_backend.gated import ACTIVATIONS, Activation
from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.norms import known_norms, use_own_norm
from backends.torch_backend.patch import is_coded_as
from backends.torch_backend.rotary import use_own_rotary

_DELTA_RULE = "torch_chunk_gated_delta_rule"  # the function, in transformers' module of each model that has it


_ACTIVATIONS = {type(ACT2FN[name]): activation for name, activation in ACTIVATIONS.items()}


def use_own_layers(model: Any) -> list[str]:
    """Modules whose code is known, whatever their name, get our own gradients. Returns the kinds."""
    replaced, norms = set(), known_norms()
    for module in model.modules():
        if use_own_norm(module, norms):
            replaced.add(NORMS)
        elif _use_own_gated_layer(module):
            replaced.add(GATED_LAYERS)
    return [*sorted(replaced, reverse=True), *([ROTARY] if use_own_rotary(model) else [])]


def delta_rule_of(model: Any) -> list[str]:
    """Which form of the gated delta rule transformers runs in this model: a library's kernels, or its own in chunks."""
    homes = {type(module).__module__ for module in model.modules()}
    functions = [getattr(sys.modules.get(home), _DELTA_RULE, None) for home in homes]
    kinds = {DELTA_KERNEL if _is_librarys(function) else DELTA_RULE for function in functions if function}
    return sorted(kinds)


def _is_librarys(function: Any) -> bool:
    """Whether transformers calls flash-linear-attention there: it decides so early, and older ones at each call."""
    chosen = getclosurevars(function).nonlocals.get("is_new_implementation")
    return is_flash_linear_attention_available() if chosen is None else bool(chosen)


def _use_own_gated_layer(module: Any) -> bool:
    """Where its last layer is adapted: a frozen one saves little as it is."""
    for known, function, forward in ((LlamaMLP, "act_fn", _gated_layer), (Phi3MLP, "activation_fn", _gated_in_one)):
        activation = _ACTIVATIONS.get(type(getattr(module, function, None)))
        if is_coded_as(module, known) and activation and isinstance(module.down_proj, LoraLinear):
            module.forward = partial(forward, module, activation)
            return True
    return False


def _gated_layer(module: Any, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    down: LoraLinear = module.down_proj
    return down.gated(activation, module.gate_proj(x), module.up_proj(x))


def _gated_in_one(module: Any, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """Phi-3's, whose gate and up are one layer's output: parts of their own are kept in its place."""
    gate, up = module.gate_up_proj(x).chunk(2, -1)
    down: LoraLinear = module.down_proj
    return down.gated(activation, gate.contiguous(), up.contiguous())
