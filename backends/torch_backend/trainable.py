"""The trainable weights of a transformers model: the adapter's, or all of them."""

from __future__ import annotations

from typing import Any

import torch

from backends.adapter_state import adapted_modules
from backends.interface import LoraSpec, ModelSpec
from backends.model_folder import folder_of
from backends.torch_backend.lora import Parameters, add_adapter
from backends.torch_backend.masks import Dropout
from backends.torch_backend.tree import model_of
from backends.whole_model import check_equal, places, read_whole, whole_shapes

_LIBRARY = "transformers"


def check_whole(spec: ModelSpec) -> None:
    """Raises BackendError where the whole model cannot be trained, before it is loaded."""
    _places(model_of(folder_of(spec)), spec)


def trained_weights(model: Any, spec: ModelSpec, lora: LoraSpec, masks: Dropout) -> Parameters:
    """What trains, by its name in a state; it has gradients from here on. Raises BackendError."""
    if not lora.whole:
        return add_adapter(model, adapted_modules(spec, lora), lora, masks)
    live = dict(model.named_parameters())
    weights = {name: live[other] for name, other in _places(model, spec).items()}
    files = read_whole(folder_of(spec), whole_shapes(spec))
    for name, weight in weights.items():
        check_equal(folder_of(spec), name, weight.detach().cpu().numpy(), files[name], _LIBRARY)
        weight.requires_grad_(True)
    for module in model.modules():  # where it pads, torch would leave the token's row untrained: it may be in rows too
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return weights


def _places(model: Any, spec: ModelSpec) -> dict[str, str]:
    """`whole_model.places` in this model. A tied output layer is one parameter with the embedding."""
    live = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return places(folder_of(spec), whole_shapes(spec), live, _LIBRARY)
