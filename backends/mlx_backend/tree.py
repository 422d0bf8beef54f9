"""A model's layers in mlx-lm, from its config and tensor shapes alone; no weights are loaded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes

from backends.formats import refuse_format
from backends.interface import BackendError, CheckedFolder, Modules, Unsupported
from backends.layer_names import Part, Tensors, lacking, refuse_untaken

Arrays = dict[str, mx.array]
_LEFT_OUT = {"ernie4_5_moe": ".e_score_correction_bias"}  # of a model's type: learned tensors that mlx-lm drops


def check_format(folder: CheckedFolder) -> None:
    """Raises BackendError where mlx-lm's models of these weights are not trained here."""
    refuse_format(folder, ("mlx-lm", "mxfp4", "mxfp8"), "MLX", "its 4-bit repository of mlx-community")
    left_out = _LEFT_OUT.get(str(folder.config.get("model_type")))
    names = folder.shapes if left_out and folder.weights else ()
    if name := next((name for name in names if name.endswith(str(left_out))), None):
        raise BackendError(
            f"{folder.path}: mlx-lm leaves {name} out, by which the model chooses its experts, and so computes another "
            "model; use another backend"
        )


def check_type(folder: CheckedFolder) -> None:
    """Raises Unsupported where mlx-lm has no model of the type that the config names."""
    if folder.config.get("model_file"):  # code of the model's own
        return
    try:
        _get_classes(config=dict(folder.config))
    except Exception as error:
        raise cannot(folder, error) from error


def build(folder: CheckedFolder) -> nn.Module:
    """The model without weights: its arrays are never computed. Raises BackendError where mlx-lm cannot run it."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):  # mlx-lm prints what it leaves out of a config
            kind, settings = _get_classes(config=dict(folder.config))
            model = kind(settings.from_dict(dict(folder.config)))
    except Exception as error:
        raise cannot(folder, error) from error
    return model


def cannot(folder: CheckedFolder, error: Exception) -> Unsupported:
    """That mlx-lm cannot load the model. A model's own code may fail in many ways on what it was not written for."""
    return Unsupported(f"{folder.path}: mlx-lm cannot load this model ({type(error).__name__}: {error!s:.300})")


def check_taken(folder: CheckedFolder) -> None:
    """Raises BackendError where mlx-lm's model has no place for weights of the language model."""
    if folder.config.get("model_file"):  # its own code says what it takes
        return
    model = build(folder)
    taken = {name for name, _ in tree_flatten(model.parameters())}
    given = set(_sanitized(model, _stand_ins(folder, {})))
    lacks = any("layers." in name for name in taken - given)
    refuse_untaken(folder, "mlx-lm", given - taken, taken, lacks)


def parts_of(folder: CheckedFolder, modules: Modules) -> dict[str, tuple[Part, ...]]:
    """Each layer's name in mlx-lm's model, or those of the layers that it is cut into, in the order of its rows.

    mlx-lm's own `sanitize` is given numbers in the place of weights, which show where each layer's rows go. Raises
    BackendError where the model has no such layers, or changes their weights.
    """
    if folder.config.get("model_file"):  # code of the model's own, which names its layers as its checkpoint does
        return {module: (Part(module, 0, outputs),) for module, (outputs, _) in modules.items()}
    if lacks := _missing(folder):
        raise BackendError(
            f"{folder.path}: mlx-lm's model needs {lacks}, which these weights do not have; use another backend"
        )
    model = build(folder)
    numbered = {module: float(number) for number, module in enumerate(modules, 1)}
    which = _passed_through(model, folder, {m: mx.array(number) for m, number in numbered.items()})
    rows = _passed_through(build(folder), folder, {m: mx.arange(modules[m][0])[:, None] for m in modules})
    by_number = {number: module for module, number in numbered.items()}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts: dict[str, list[Part]] = {module: [] for module in modules}
    for name, numbers in which.items():
        module = by_number.get(float(numbers[0]))
        places = rows[name]
        in_order = np.array_equal(places, places[0] + np.arange(len(places)))
        if module and name in linear and in_order and np.all(numbers == numbers[0]):
            parts[module].append(Part(name, int(places[0]), int(places[0]) + len(places)))
    lost = [module for module in modules if not _is_whole(parts[module], modules[module][0])]
    if lost:
        raise BackendError(lacking(folder.path, "mlx-lm", lost))
    return {module: tuple(sorted(pieces, key=lambda part: part.first)) for module, pieces in parts.items()}


def looks_for(folder: CheckedFolder, config: Mapping[str, Any]) -> Tensors:
    """The tensors that mlx-lm reads for an adapter with this config. Raises BackendError where it would refuse it."""
    check_format(folder)
    if lacks := _missing(folder):
        raise BackendError(f"its model needs {lacks}, which the base does not have")
    model = build(folder)
    settings = config["lora_parameters"] | {"keys": set(config["lora_parameters"]["keys"])}
    try:
        linear_to_lora_layers(model, config["num_layers"], settings, use_dora=config["fine_tune_type"] == "dora")
    except Exception as error:
        raise BackendError(f"{type(error).__name__}: {error}") from error
    tensors = tree_flatten(model.parameters())
    return {name: tuple(value.shape) for name, value in tensors if name.endswith((".lora_a", ".lora_b", ".m"))}


def _missing(folder: CheckedFolder) -> str | None:
    """A tensor of the model that mlx-lm does not make of the folder's weights; None: it makes all of them."""
    model = build(folder)  # one for each reading: `sanitize` may take the head from a model
    given = _sanitized(model, _stand_ins(folder, {}))
    return min({name for name, _ in tree_flatten(model.parameters())} - set(given), default=None)


def _passed_through(model: nn.Module, folder: CheckedFolder, values: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """What `sanitize` makes of modules' weights that are `values` in every column: the first column of each. [rows]"""
    weights = _sanitized(model, _stand_ins(folder, {f"{module}.weight": value for module, value in values.items()}))
    columns = {
        name.removesuffix(".weight"): value[:, 0].astype(mx.float32)
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim == 2 and value.size
    }
    blocks = {name: column for name, column in columns.items() if "layers." in name}
    mx.eval(blocks)
    return {name: np.array(column) for name, column in blocks.items()}


def _stand_ins(folder: CheckedFolder, values: Arrays) -> Arrays:
    """An array for each of the model's tensors, as it is unpacked; views of one number or column, which take no memory.

    Layers that bitsandbytes has packed stand in the files as one column of bytes, which has not the layer's rows.
    """
    zero = mx.zeros(())
    return {name: mx.broadcast_to(values.get(name, zero), shape) for name, shape in folder.whole_shapes.items()}


def _sanitized(model: nn.Module, weights: Arrays) -> Arrays:
    if not hasattr(model, "sanitize"):
        return weights
    try:
        changed: Arrays = model.sanitize(weights)
    except Exception as error:
        raise BackendError(f"mlx-lm cannot read these weights ({type(error).__name__}: {error!s:.300})") from error
    return changed


def _is_whole(parts: list[Part], outputs: int) -> bool:
    """Whether the parts are all rows of a layer, each once."""
    ends = sorted((part.first, part.last) for part in parts)
    starts, lasts = [first for first, _ in ends], [last for _, last in ends]
    return bool(ends) and starts == [0, *lasts[:-1]] and lasts[-1] == outputs
