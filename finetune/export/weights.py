"""Numbers of a merged model in files, one tensor in memory at a time, and the files checked against the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backends.interface import FloatArray
from finetune.disk.safetensors_file import read_header
from finetune.errors import EnvironmentProblem, Incompatible
from finetune.export.verify import Check

Kind = Literal["f32", "f16", "bf16"]
KINDS: dict[Kind, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # from the finest to the coarsest
LARGEST = 4_000_000_000  # bytes of tensors in one file
_LARGEST_HALF = float(np.finfo(np.float16).max)
_ONE = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}  # what rounding may change of a number, over the number
_TINY = 6e-8  # and beside it: float16 has no smaller number
# What packing may change of a tensor: the root of the mean square of the changes, over that of the numbers.
_ALL = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.06, "Q5_1": 0.06, "Q4_K": 0.12}


def base_kind(files: Iterable[Path]) -> Kind:
    """The type of the most numbers that are not packed: what a model is held in."""
    bytes_of: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for entry in (entry for file in files for entry in read_header(file)[0].values()):
        if (kind := entry["dtype"].lower()) in bytes_of:
            bytes_of[kind] += entry["data_offsets"][1] - entry["data_offsets"][0]
    if not any(bytes_of.values()):
        raise Incompatible("the model's files hold no float32, float16 or bfloat16")
    return max(bytes_of, key=lambda kind: bytes_of[kind])


def cast(numbers: FloatArray, kind: Kind, name: str) -> NDArray[Any]:
    """The numbers in their type, rounded to the nearest; bfloat16 as uint16.

    Raises EnvironmentProblem for numbers beyond float16.
    """
    if kind == "f32":
        return np.ascontiguousarray(numbers, "<f4")
    if kind == "f16":
        if np.abs(numbers).max(initial=0.0) > _LARGEST_HALF:
            raise EnvironmentProblem(f"{name} holds numbers beyond float16's {_LARGEST_HALF:,.0f}; use --type bf16")
        return np.ascontiguousarray(numbers, "<f2")
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, FloatArray]],
    kind: Kind,
    largest: int = LARGEST,
) -> None:
    """`model.safetensors`, or several files and an index where the tensors have more than `largest` bytes.

    Raises as `fill` does.
    """
    files: list[dict[str, Any]] = [{}]
    end = total = 0
    for name, shape in shapes.items():
        size = prod(shape) * (4 if kind == "f32" else 2)
        if files[-1] and end + size > largest:
            files.append({})
            end = 0
        files[-1][name] = {"dtype": kind.upper(), "shape": list(shape), "data_offsets": [end, end + size]}
        end, total = end + size, total + size
    places: dict[str, tuple[Path, int]] = {}
    for number, entries in enumerate(files, 1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / f"model{part}.safetensors"
        head = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        path.write_bytes(len(head).to_bytes(8, "little") + head)
        places |= {name: (path, 8 + len(head) + entry["data_offsets"][0]) for name, entry in entries.items()}
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file.name for name, (file, _) in places.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    fill(places, shapes, tensors, lambda name, numbers: cast(numbers, kind, name))


def fill(
    places: Mapping[str, tuple[Path, int]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, FloatArray]],
    pack: Callable[[str, FloatArray], NDArray[Any]],
) -> None:
    """Writes each tensor at its place, which a header has said before: they may come in any order.

    places: file and first byte. Raises Incompatible where a tensor is missing or has another shape.
    """
    waiting = dict(places)
    for name, numbers in tensors:
        if name not in waiting or numbers.shape != tuple(shapes[name]):
            raise Incompatible(f"{name} has the shape {list(numbers.shape)}, and not that of the model's config")
        file, start = waiting.pop(name)
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(np.ascontiguousarray(pack(name, numbers)).reshape(-1).view(np.uint8).data)
    if waiting:
        raise Incompatible(f"{len(waiting)} tensors of the model are missing, the first is {next(iter(waiting))}")


def file_check(
    held: Mapping[str, tuple[str, Callable[[], FloatArray]]], wanted: Iterable[tuple[str, FloatArray]], note: str = ""
) -> Check:
    """The tensors read again from the disk, beside the numbers that were to be written. held: their types too."""
    left, wrong, worst, where = dict(held), [], 0.0, ""
    for name, numbers in wanted:
        kind, read = left.pop(name, ("", None))
        found = read() if read else None
        if found is None or found.shape != numbers.shape:
            wrong.append(name)
            continue
        change = np.abs(np.subtract(found, numbers, dtype=np.float64))
        error = _size(change) / (_size(numbers) or 1.0)
        if error > worst:
            worst, where = error, name
        one = (change <= _ONE[kind] * np.abs(numbers) + _TINY).all() if kind in _ONE else error <= _ALL[kind]
        if not one:
            wrong.append(name)
    wrong += sorted(left)
    on = f"{len(held):,} tensors"
    if wrong:
        return Check("file", on, f"{len(wrong)} differ", "no", ", ".join(wrong[:3]))
    return Check("file", on, f"rounding changed {worst:.1e} of a tensor at most{note}", "yes", where)


def _size(numbers: NDArray[Any]) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(numbers, dtype=np.float64)))) if numbers.size else 0.0
