"""The trainable weights of an MLX model and where they are in it: the adapter's, or all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from backends.adapter_state import adapted_modules, magnitudes_of
from backends.interface import MAGNITUDE, FloatArray, LoraSpec, ModelSpec
from backends.mlx_backend.lora import Attached, Dropout, attach
from backends.mlx_backend.optim import Tensors
from backends.mlx_backend.tree import build, parts_of
from backends.model_folder import folder_of
from backends.whole_model import check_equal, places, read_whole, whole_shapes

_LIBRARY = "mlx-lm"


class Trained(Protocol):
    """The model's places for what trains."""

    @property
    def transposed(self) -> bool:
        """Whether MLX holds a state's matrices transposed."""

    def put(self, tensors: Tensors) -> None:
        """A state's tensors, or those of a trace, into the model."""


class Adapters(NamedTuple):
    """One for each adapted layer, by its name."""

    attached: Mapping[str, Attached]
    transposed: bool = True

    def put(self, tensors: Tensors) -> None:
        for module, layers in self.attached.items():
            factors = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
            layers.put(*factors, tensors.get(f"{module}.{MAGNITUDE}"))

    def magnitudes(self) -> dict[str, FloatArray]:
        """DoRA's, of the base: the lengths of its rows. Raises BackendError where a row is zero."""
        measured = {module: [layer.measure() for layer in one.layers] for module, one in self.attached.items()}
        return magnitudes_of({module: np.concatenate([np.array(part) for part in p]) for module, p in measured.items()})


class Place(NamedTuple):
    """Of one weight."""

    module: nn.Module
    key: str

    @property
    def value(self) -> mx.array:
        array: mx.array = self.module[self.key]
        return array

    def put(self, value: mx.array) -> None:
        self.module[self.key] = value


class Weights(NamedTuple):
    """All of the model's, by their names in the checkpoint."""

    places: Mapping[str, Place]
    transposed: bool = False

    def put(self, tensors: Tensors) -> None:
        for name, place in self.places.items():
            place.put(tensors[name])


def check_whole(spec: ModelSpec) -> None:
    """Raises BackendError where the whole model cannot be trained, before it is loaded."""
    shapes, folder = whole_shapes(spec), folder_of(spec)
    if not folder.config.get("model_file"):  # code of the model's own is run when it is loaded
        places(folder, shapes, _shapes_of(build(folder)), _LIBRARY)


def trained_weights(model: nn.Module, spec: ModelSpec, lora: LoraSpec, masks: Dropout) -> Trained:
    """What trains; it is not frozen from here on. Raises BackendError where it cannot be trained."""
    folder = folder_of(spec)
    if not lora.whole:
        return Adapters(attach(model, parts_of(folder, adapted_modules(spec, lora)), lora, masks))
    shapes, modules = whole_shapes(spec), dict(model.named_modules())
    files, found = read_whole(folder, shapes), {}
    for name, other in places(folder, shapes, _shapes_of(model), _LIBRARY).items():
        module, _, key = other.rpartition(".")
        found[name] = Place(modules[module], key)
        check_equal(folder, name, np.array(found[name].value), files[name], _LIBRARY)
    model.unfreeze()
    return Weights(found)


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
