"""The tuned model as one: each weight of the base with the adapter's product added, one tensor at a time, in files that
are checked against the numbers.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import MAGNITUDE, FloatArray, LoraSpec, Session
from backends.model_folder import ModelFolder, read_object
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.disk.adapter import Adapter
from finetune.disk.safetensors_file import header_bytes, read_header, read_tensor
from finetune.errors import EnvironmentProblem, Incompatible
from finetune.export.verify import Check

KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # from the finest to the coarsest
Tensors = Mapping[str, Callable[[], FloatArray]]  # name -> what reads or computes it: one at a time is in memory
Held = Mapping[str, tuple[str, Callable[[], FloatArray]]]  # tensor of a file -> its type, and what reads it
LARGEST = 4_000_000_000  # bytes of tensors in one file, about
_LARGEST_HALF = float(np.finfo(np.float16).max)
_ONE = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}  # what rounding may change of a number, over the number
_TINY = 6e-8  # and beside it: float16 has no smaller number
# What packing may change of a tensor: the root of the mean square of the changes, over that of the numbers.
_ALL = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.06, "Q5_1": 0.06, "Q4_K": 0.12}
_QUANTISED = ("quantization", "quantization_config")  # of config.json


def tensors(session: Session, folder: ModelFolder, adapter: Adapter, original: bool = False) -> Tensors:
    """Every tensor of the merged model under its name in the checkpoint, in its order.

    What was quantised for training is taken as the session multiplies with it: that is what the adapter was trained on.
    original: take the weights of the files all the same, for a model that is quantised again on the same grid, where
    the rounding would undo the tuning. Raises Incompatible where the adapter has a layer that the model lacks.
    """
    plain, shapes = original or session.scheme == "none", folder.whole_shapes
    held = folder.packed if plain else folder.packed | set(folder.lora_modules(LoraSpec(1, 1.0)))
    files = {name: file for file, there in folder.weights.items() for name in there if name in shapes}
    adapted = {f"{name.rpartition('.')[0]}.weight" for name in adapter.tensors}
    if lacking := adapted - files.keys():
        raise Incompatible(f"{folder.path} has no tensor {', '.join(sorted(lacking))}, which the adapter changes")

    def numbers(name: str) -> FloatArray:
        module, _, part = name.rpartition(".")
        whole = session.base_weight(module) if part == "weight" and module in held else _read(files[name], name)
        if whole.shape != tuple(shapes[name]):
            there, told = list(whole.shape), list(shapes[name])
            raise Incompatible(f"{files[name]}: {name} has the shape {there}, and by the model's config {told}")
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


def _read(file: Path, name: str) -> FloatArray:
    try:
        return read_tensor(file, name)
    except ValueError as error:
        raise EnvironmentProblem(
            f"{file}: {error}, and only float32, float16 and bfloat16 are exported; train on a model in one of these"
        ) from None


def base_kind(files: Iterable[Path]) -> str:
    """The type of the most numbers that are not packed: what a model is held in."""
    bytes_of: Counter[str] = Counter()
    for entry in (entry for file in files for entry in read_header(file)[0].values()):
        bytes_of[entry["dtype"].lower()] += entry["data_offsets"][1] - entry["data_offsets"][0]
    if not any(bytes_of[kind] for kind in KINDS):
        raise Incompatible("the model's files hold no float32, float16 or bfloat16")
    return max(KINDS, key=lambda kind: bytes_of[kind])


def cast(numbers: FloatArray, kind: str, name: str) -> NDArray[Any]:
    """The numbers in their type, rounded to the nearest; bfloat16 as uint16.

    Raises EnvironmentProblem for numbers beyond float16.
    """
    if kind == "f16" and np.abs(numbers).max(initial=0.0) > _LARGEST_HALF:
        raise EnvironmentProblem(f"{name} holds numbers beyond float16's {_LARGEST_HALF:,.0f}; use --type bf16")
    if kind != "bf16":
        return np.ascontiguousarray(numbers, "<f4" if kind == "f32" else "<f2")
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, kind: str, largest: int = LARGEST
) -> None:
    """`model.safetensors`, or several files of about `largest` bytes and an index.

    shapes: of the tensors.
    """
    *starts, total = accumulate(((4 if kind == "f32" else 2) * prod(shape) for shape in shapes.values()), initial=0)
    files: dict[int, dict[str, tuple[int, ...]]] = {}
    for (name, shape), start in zip(shapes.items(), starts, strict=True):
        files.setdefault(start // largest, {})[name] = shape
    places: dict[str, str] = {}
    for number, part in enumerate(files.values(), 1):
        file = folder / f"model{f'-{number:05d}-of-{len(files):05d}' if len(files) > 1 else ''}.safetensors"
        with file.open("wb") as opened:
            opened.write(header_bytes(part, kind.upper(), {"format": "pt"}))
            for name in part:
                opened.write(cast(tensors[name](), kind, name).data)
        places |= dict.fromkeys(part, file.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


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
    # Both spellings of the rotary settings: transformers 5 writes `rope_parameters`, other readers know the older keys.
    config = {key: value for key, value in folder.config.items() if key not in (*_QUANTISED, "_name_or_path")}
    _write_json(to / "config.json", config | {"dtype": KINDS[kind], "torch_dtype": KINDS[kind]})
    if folder.remote_code:
        for file in folder.path.glob("*.py"):
            shutil.copyfile(file, to / file.name)


def write_tokenizer(to: Path, folder: ModelFolder, tokenizer: Tokenizer, template: str) -> None:
    """The tokenizer with this chat template, where new and old readers look for it, and what ends an answer."""
    travelling = copy.copy(tokenizer)
    travelling.chat_template = template
    travelling.save_pretrained(to)
    settings = to / "tokenizer_config.json"
    _write_json(settings, read_object(settings) | {"chat_template": template})
    for file in folder.path.glob("*.model"):  # SentencePiece's own, which some readers want
        shutil.copyfile(file, to / file.name)
    generation = folder.path / "generation_config.json"
    stated = read_object(generation) if generation.exists() else {}
    _write_json(to / "generation_config.json", stated | {"eos_token_id": sorted(stop_tokens(tokenizer))})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
