"""Initial adapter weights, the same on every backend, and checks of a training state's shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from backends.interface import (
    HEAD_WEIGHT,
    MAGNITUDE,
    BackendError,
    CheckedFolder,
    FloatArray,
    IncompatibleState,
    LoraSpec,
    ModelSpec,
    Modules,
    TrainState,
)
from backends.model_folder import folder_of
from backends.text_blocks import ending
from backends.whole_model import read_whole, whole_shapes

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_HEAD = "this session has no classification head; set LoraSpec.classes"
NO_TEXT = "this model has a classification head in the place of its output layer, and writes no text"


def adapted_modules(model: ModelSpec, lora: LoraSpec) -> Modules:
    """The layers with an adapter; none where the whole model trains. Raises BackendError as `lora_modules` does."""
    return {} if lora.whole else folder_of(model).lora_modules(lora)


def trained_shapes(model: ModelSpec, lora: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Of everything that trains. Raises BackendError for what cannot."""
    folder = folder_of(model)
    head = head_shape(folder, lora)
    if lora.whole and head:
        raise BackendError(f"{folder.path}: a whole model trains with its own output layer; a head has an adapter")
    return whole_shapes(model) if lora.whole else adapter_shapes(folder.lora_modules(lora), lora.rank, head, lora.dora)


def untrained(
    model: ModelSpec, lora: LoraSpec, seed: int, magnitudes: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """`Session.untrained`: the initial adapter, or the whole model as its files have it. magnitudes: with DoRA."""
    folder = folder_of(model)
    if lora.whole:
        return read_whole(folder, whole_shapes(model))
    return initial_adapter(folder.lora_modules(lora), lora.rank, seed, head_shape(folder, lora), magnitudes)


def head_shape(folder: CheckedFolder, lora: LoraSpec) -> tuple[int, int] | None:
    """Of the head's weight, (K, D); None where there is none. Raises BackendError where the config says no D."""
    if not lora.classes:
        return None
    hidden = folder.text_config.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        raise BackendError(f"{folder.path}: config.json has no hidden_size, which a classification head needs")
    return lora.classes, hidden


def initial_adapter(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    seed: int,
    head: tuple[int, int] | None = None,
    magnitudes: Mapping[str, FloatArray] | None = None,
) -> dict[str, FloatArray]:
    """A uniform in +-1/sqrt(in) [r, in], as PEFT and mlx-lm draw it; B zero [out, r], so training starts at the base.

    `shapes` maps a module to (out, in). Each module has its own generator, so adding or leaving out
    one module changes no other. A head of that shape is zero. magnitudes: of the base, with DoRA.
    """
    adapter: dict[str, FloatArray] = {}
    for module, (outputs, inputs) in shapes.items():
        digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        bound = 1.0 / np.sqrt(inputs)
        adapter[f"{module}.lora_A"] = rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        adapter[f"{module}.lora_B"] = np.zeros((outputs, rank), dtype=np.float32)
        if magnitudes:
            adapter[f"{module}.{MAGNITUDE}"] = magnitudes[f"{module}.{MAGNITUDE}"].copy()
    return adapter if head is None else {**adapter, HEAD_WEIGHT: np.zeros(head, np.float32)}


def adapter_shapes(
    modules: Mapping[str, tuple[int, int]], rank: int, head: tuple[int, int] | None = None, dora: bool = False
) -> dict[str, tuple[int, ...]]:
    """`<module>.lora_A` -> (r, in) and `<module>.lora_B` -> (out, r), of `modules` -> (out, in), and with DoRA
    `<module>.magnitude` -> (out,); then the head's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (outputs, inputs) in modules.items():
        shapes[f"{module}.lora_A"] = (rank, inputs)
        shapes[f"{module}.lora_B"] = (outputs, rank)
        if dora:
            shapes[f"{module}.{MAGNITUDE}"] = (outputs,)
    return shapes if head is None else {**shapes, HEAD_WEIGHT: head}


def magnitudes_of(lengths: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """DoRA's tensors of the base, from the lengths of each module's rows [out].

    Raises BackendError where a row is zero: DoRA divides by its length, and so do the libraries that load the adapter.
    """
    for module, length in lengths.items():
        if not (np.isfinite(length) & (length > 0)).all():
            raise BackendError(
                f"{module} has rows of zeros or without a finite length, which DoRA cannot scale; leave the layer out "
                "of lora.targets, or remove lora.dora"
            )
    return {f"{module}.{MAGNITUDE}": length for module, length in lengths.items()}


def fitting(state: TrainState, shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
    """`state` in float32 with every moment present. Raises IncompatibleState with every difference.

    Arrays that fit are the state's own: a session copies them. Adapters of other programs may name the beginning of a
    layer's name otherwise.
    """
    adapter = _as_named_here(state.adapter, shapes)
    moment_shapes = {f"{name}.{kind}": shape for name, shape in shapes.items() for kind in MOMENTS}
    moments = state.moments or {name: np.zeros(shape, np.float32) for name, shape in moment_shapes.items()}
    _refuse(_differences(adapter, shapes) + _differences(moments, moment_shapes))
    return TrainState(state.step, _in_order(adapter, shapes), _in_order(moments, moment_shapes))


def fitting_trained(tensors: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FloatArray]:
    """The same for what trains alone."""
    named = _as_named_here(tensors, shapes)
    _refuse(_differences(named, shapes))
    return _in_order(named, shapes)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise IncompatibleState("; ".join(problems))


def _in_order(tensors: Mapping[str, FloatArray], names: Iterable[str]) -> dict[str, FloatArray]:
    return {name: np.require(tensors[name], np.float32, "W") for name in names}


def _as_named_here(offered: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FloatArray]:
    by_ending = {ending(name): name for name in shapes}
    return {name if name in shapes else by_ending.get(ending(name), name): value for name, value in offered.items()}


def _differences(offered: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = [f"{name} is missing" for name in shapes if name not in offered]
    found += [f"{name} is unknown here" for name in offered if name not in shapes]
    return found + [
        f"{name} is {list(np.shape(offered[name]))}, needed {list(shape)}"
        for name, shape in shapes.items()
        if name in offered and np.shape(offered[name]) != shape
    ]
