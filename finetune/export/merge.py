"""The tuned model as one: each weight of the base with the adapter's product added, one tensor at a time, in files that
are checked against the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.interface import MAGNITUDE, FloatArray, LoraSpec, Session
from backends.model_folder import ModelFolder, read_header
from finetune.disk.adapter import Adapter
from finetune.disk.model_writer import KINDS, Tensors, read_numbers, whole_model, write_config, write_weights
from finetune.errors import Incompatible
from finetune.export.verify import Check

Held = Mapping[str, tuple[str, Callable[[], FloatArray]]]  # tensor of a file -> its type, and what reads it
_ONE = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}  # what rounding may change of a number, over the number
_TINY = 6e-8  # and beside it: float16 has no smaller number
# What packing may change of a tensor: the root of the mean square of the changes, over that of the numbers.
_ALL = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.06, "Q5_1": 0.06, "Q4_K": 0.12}


def tensors(session: Session, folder: ModelFolder, adapter: Adapter, original: bool = False) -> Tensors:
    """Every tensor of the merged model under its name in the checkpoint, in its order.

    What was quantised for training is taken as the session multiplies with it: that is what the adapter was trained on.
    original: take the weights of the files all the same, for a model that is quantised again on the same grid, where
    the rounding would undo the tuning.
    """
    if adapter.whole:
        return whole_model(folder, adapter.tensors)
    plain, shapes = original or session.scheme == "none", folder.whole_shapes
    held = folder.packed if plain else folder.packed | set(folder.lora_modules(LoraSpec(1, 1.0)))
    files = {name: file for file, there in folder.weights.items() for name in there if name in shapes}
    adapted = {f"{name.rpartition('.')[0]}.weight" for name in adapter.tensors}

    def numbers(name: str) -> FloatArray:
        module, _, part = name.rpartition(".")
        whole = session.base_weight(module) if part == "weight" and module in held else read_numbers(files[name], name)
        if whole.shape != tuple(shapes[name]):
            raise Incompatible(f"{files[name]}: {name} has the shape {list(whole.shape)}, not {list(shapes[name])}")
        return merged(whole, adapter, module) if name in adapted else whole

    return {name: partial(numbers, name) for name in files}


def merged(weight: FloatArray, adapter: Adapter, module: str) -> FloatArray:
    """W + scale * B A, with DoRA in the rows' learned lengths; in float64, rounded once. [out, in]"""
    a, b = (adapter.tensors[f"{module}.lora_{part}"].astype(np.float64) for part in "AB")
    total: NDArray[np.float64] = weight + adapter.scale * (b @ a)
    if (magnitude := adapter.tensors.get(f"{module}.{MAGNITUDE}")) is not None:
        total *= (magnitude / np.linalg.norm(total, axis=1))[:, None]
    rounded: FloatArray = total.astype(np.float32)
    return rounded


def base_kind(files: Iterable[Path]) -> str:
    """The type of the most numbers that are not packed: what a model is held in."""
    bytes_of: Counter[str] = Counter()
    for entry in (entry for file in files for entry in read_header(file)[0].values()):
        bytes_of[entry["dtype"].lower()] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return max(KINDS, key=lambda kind: bytes_of[kind])


def file_check(held: Held, wanted: Tensors, note: str = "") -> Check:
    """The tensors read again from the disk, beside the numbers that were to be written."""
    wrong, worst = sorted(held.keys() - wanted.keys()), (0.0, "")
    for name, right in wanted.items():
        kind, read = held.get(name, ("F32", lambda: np.empty(0, np.float32)))
        found, numbers = read(), right()
        same = found.shape == numbers.shape
        if same:
            change = np.linalg.norm(np.subtract(found, numbers, dtype=np.float64))
            error = float(change / (np.linalg.norm(numbers.astype(np.float64)) or 1.0))
            worst = max(worst, (error, name))
            same = np.allclose(found, numbers, _ONE[kind], _TINY) if kind in _ONE else error <= _ALL[kind]
        if not same:
            wrong.append(name)
    on = f"{len(held):,} tensors"
    if wrong:
        return Check("file", on, f"{len(wrong)} differ", "no", ", ".join(wrong[:3]))
    return Check("file", on, f"rounding changed {worst[0]:.1e} of a tensor at most{note}", "yes", worst[1])


def write_merged(
    to: Path, session: Session, folder: ModelFolder, adapter: Adapter, kind: str, original: bool = False
) -> None:
    """The weights and config.json of the merged model into the folder `to`, which exists."""
    write_weights(to, folder.whole_shapes, tensors(session, folder, adapter, original), kind)
    write_config(to, folder, kind)
