"""Full fine-tuning: every weight of the language model, by its name in the checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from backends.formats import quantised_by
from backends.interface import BackendError, CheckedFolder, Device, FloatArray, Half, ModelSpec
from backends.layer_names import is_used, within
from backends.model_folder import folder_of, read_header, read_tensor

Shapes = Mapping[str, tuple[int, ...]]

PACKED = "its weights are quantised, and a quantised weight cannot take a small step; give the unquantised model"


def refuse_packed(model: ModelSpec) -> None:
    """Raises BackendError where the weights are not numbers that a step can change."""
    folder = folder_of(model)
    if model.quantize != "none":
        raise BackendError(f"{folder.path}: weights of 4 bits cannot be trained themselves; set quantize: none")
    if quantised_by(folder.config) is not None:
        raise BackendError(f"{folder.path}: {PACKED}, or train an adapter (method: lora)")


def refuse_half(model: ModelSpec, device: Device, half: Half) -> None:
    """Raises BackendError for weights of 16 bits: most steps are smaller than half the gap to their next number."""
    if (number := model.number_type(device, half)) != "float32":
        raise BackendError(f"{model.path}: a whole model trains in float32, and model.dtype is {number} here")


def whole_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every weight that trains -> its shape, in the files' order. Raises BackendError for quantised weights."""
    refuse_packed(model)
    folder = folder_of(model)
    return {
        name: shape
        for name, shape in folder.shapes.items()
        if (is_used(folder, name) or name.endswith(("lm_head.weight", "lm_head.bias"))) and not is_tied(folder, name)
    }


def is_tied(folder: CheckedFolder, name: str) -> bool:
    """Whether the tensor is an output layer that the model takes from its embedding, whatever the file says."""
    said = folder.text_config.get("tie_word_embeddings", folder.config.get("tie_word_embeddings", False))
    return bool(said) and name.endswith("lm_head.weight")


def read_whole(folder: CheckedFolder, shapes: Shapes) -> dict[str, FloatArray]:
    """Those tensors as the base's files have them."""
    found: dict[str, FloatArray] = {}
    for file, names in folder.weights.items():
        header = read_header(file)
        for name in (name for name in names if name in shapes):
            try:
                found[name] = read_tensor(file, name, header)
            except ValueError as error:
                raise BackendError(
                    f"{file}: {error}, which do not train; give a model in float32 or bfloat16"
                ) from None
    return {name: found[name] for name in shapes}


def places(folder: CheckedFolder, shapes: Shapes, live: Shapes, library: str) -> dict[str, str]:
    """Each weight -> its name in the library's model, which has it as the files do.

    live: all weights of that model. Raises BackendError where one of either has no partner of its shape.
    """
    by_place = {within(name): name for name in live}
    found = {name: by_place.get(within(name), "") for name in shapes}
    wrong = [name for name, other in found.items() if not other or tuple(live[other]) != tuple(shapes[name])]
    wrong += sorted({*live} - {*found.values()})
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise BackendError(
            f"{folder.path}: {library} holds {shown} in another form than these files, so the whole model cannot be "
            "trained and written back; train an adapter (method: lora), or use another backend"
        )
    return found


def check_equal(folder: CheckedFolder, name: str, live: FloatArray, file: FloatArray, library: str) -> None:
    """Raises BackendError where a library's model has other numbers than the files: it changes them as it loads."""
    if not np.array_equal(live, file):
        raise BackendError(
            f"{folder.path}: {library} changes {name} as it loads it, so the whole model cannot be trained and written "
            "back; train an adapter (method: lora), or use another backend"
        )


def numbers_of(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))
