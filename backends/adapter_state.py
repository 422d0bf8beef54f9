"""The shape of a training state, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from backends.interface import FloatArray, IncompatibleState, TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")


def adapter_shapes(modules: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    """`<module>.lora_A` -> (r, in) and `<module>.lora_B` -> (out, r), of `modules` -> (out, in)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (outputs, inputs) in modules.items():
        shapes[f"{module}.lora_A"] = (rank, inputs)
        shapes[f"{module}.lora_B"] = (outputs, rank)
    return shapes


def fitting(state: TrainState, shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
    """A float32 copy of `state` with every moment present. Raises IncompatibleState with every difference."""
    moment_shapes = {f"{name}.{kind}": shape for name, shape in shapes.items() for kind in MOMENTS}
    moments = state.moments or {name: np.zeros(shape, np.float32) for name, shape in moment_shapes.items()}
    problems = _differences(state.adapter, shapes) + _differences(moments, moment_shapes)
    if problems:
        raise IncompatibleState("; ".join(problems))
    return TrainState(
        state.step,
        {name: np.array(state.adapter[name], dtype=np.float32) for name in shapes},
        {name: np.array(moments[name], dtype=np.float32) for name in moment_shapes},
    )


def _differences(offered: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = [f"{name} is missing" for name in shapes if name not in offered]
    found += [f"{name} is unknown here" for name in offered if name not in shapes]
    return found + [
        f"{name} is {list(np.shape(offered[name]))}, needed {list(shape)}"
        for name, shape in shapes.items()
        if name in offered and np.shape(offered[name]) != shape
    ]
