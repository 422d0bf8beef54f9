"""Numbers in safetensors files, one tensor in memory at a time: read as float32, written as any of three types."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backends.interface import FloatArray
from finetune.errors import EnvironmentProblem, Incompatible

Kind = Literal["f32", "f16", "bf16"]
KINDS: dict[str, tuple[Kind, str]] = {
    "F32": ("f32", "float32"),
    "F16": ("f16", "float16"),
    "BF16": ("bf16", "bfloat16"),
}
LARGEST = 4_000_000_000  # bytes of tensors in one file
_ENTRY = 160  # bytes of a tensor in a header, beside its name, at most
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Written:
    """What was written of one tensor."""

    shape: tuple[int, ...]
    checksum: int  # crc32 of its bytes
    error: float  # root of the mean square of what rounding changed, over that of the numbers


def read_header(file: Path) -> tuple[Mapping[str, Any], int]:
    """Each tensor's entry, and where the tensors begin. Of a file that was checked before."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size


_header = cache(read_header)  # by the file: a model's weights are read once, tensor by tensor


def raw_bytes(file: Path, name: str) -> NDArray[np.uint8]:
    """The bytes of a tensor as they stand in the file, mapped."""
    header, begin = _header(file)
    start, end = header[name]["data_offsets"]
    if start == end:
        return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, "r", begin + start, (end - start,))


def kind_of(file: Path, name: str) -> Kind:
    """The type of a tensor's numbers. Raises EnvironmentProblem for one that an export cannot hold."""
    stated = str(_header(file)[0][name]["dtype"])
    if stated not in KINDS:
        raise EnvironmentProblem(
            f"{file}: {name} holds {stated}, and only float32, float16 and bfloat16 are exported; train on a model in "
            "one of these"
        )
    return KINDS[stated][0]


def read_tensor(file: Path, name: str) -> FloatArray:
    """A tensor's numbers. Raises EnvironmentProblem as `kind_of` does."""
    raw = raw_bytes(file, name)
    shape = tuple(_header(file)[0][name]["shape"])
    kind = kind_of(file, name)
    if kind == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    numbers: FloatArray = raw.view("<f4" if kind == "f32" else "<f2").astype(np.float32).reshape(shape)
    return numbers


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


def _error(numbers: FloatArray, rounded: NDArray[Any]) -> float:
    back = (rounded.astype(np.uint32) << 16).view(np.float32) if rounded.dtype == np.uint16 else rounded
    size = float(np.sqrt(np.mean(np.square(numbers, dtype=np.float64)))) if numbers.size else 0.0
    change = np.subtract(back, numbers, dtype=np.float64)
    return float(np.sqrt(np.mean(np.square(change)))) / size if size else 0.0


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, FloatArray]], names: Iterable[str], kind: Kind, largest: int = LARGEST
) -> dict[str, Written]:
    """The tensors in `model.safetensors`, or in several files and an index where they are larger than `largest` bytes.

    names: those that may come, which say how much room a header needs.
    """
    room = 64 + sum(len(json.dumps(name)) + _ENTRY for name in names)
    files: list[_File] = []
    done: dict[str, Written] = {}
    try:
        for name, numbers in tensors:
            rounded = cast(numbers, kind, name)
            if not files or (files[-1].size and files[-1].size + rounded.nbytes > largest):
                files.append(_File(folder / f"part-{len(files)}", room, kind))
            checksum = files[-1].add(name, rounded)
            done[name] = Written(numbers.shape, checksum, _error(numbers, rounded))
    finally:
        for file in files:
            file.close()
    _name(folder, files)
    return done


def _name(folder: Path, files: list[_File]) -> None:
    if len(files) == 1:
        files[0].path.rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(folder / name)
        places |= dict.fromkeys(file.entries, name)
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _File:
    """A safetensors file that grows by one tensor at a time: room for its header is kept free until the end."""

    def __init__(self, path: Path, room: int, kind: Kind) -> None:
        self.path, self.size = path, 0  # bytes of its tensors
        self.entries: dict[str, Any] = {}
        self._room = room + -room % 8
        self._type = kind.upper()
        self._opened = path.open("xb")
        self._opened.seek(8 + self._room)

    def add(self, name: str, numbers: NDArray[Any]) -> int:
        """The checksum of the bytes."""
        data = numbers.reshape(-1).view(np.uint8).data
        offsets = [self.size, self.size + numbers.nbytes]
        self.entries[name] = {"dtype": self._type, "shape": list(numbers.shape), "data_offsets": offsets}
        self._opened.write(data)
        self.size += numbers.nbytes
        return zlib.crc32(data)

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.entries, separators=(",", ":")).encode()
        self._opened.seek(0)
        self._opened.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._opened.close()


def check_weights(files: Iterable[Path], written: Mapping[str, Written]) -> list[str]:
    """What the files hold otherwise than it was written, in words; read again from the disk."""
    return [f"{name} {why}" for name, why in _differences(files, written)]


def _differences(files: Iterable[Path], written: Mapping[str, Written]) -> Iterator[tuple[str, str]]:
    missing = dict(written)
    for file in files:
        header, _ = read_header(file)
        for name, entry in header.items():
            wanted = missing.pop(name, None)
            if wanted is None:
                yield name, "was not written, or stands there twice"
            elif tuple(entry["shape"]) != wanted.shape:
                yield name, f"has the shape {entry['shape']}, and not {list(wanted.shape)}"
            elif zlib.crc32(raw_bytes(file, name).data) != wanted.checksum:
                yield name, "has other bytes than were written"
    for name in missing:
        yield name, "is not there"


def base_kind(files: Iterable[Path]) -> Kind:
    """The type of the largest tensor that is not packed: what a model's numbers are held in."""
    sizes = {kind: 0 for kind, _ in KINDS.values()}
    for file in files:
        for entry in _header(file)[0].values():
            if entry["dtype"] in KINDS:
                start, end = entry["data_offsets"]
                sizes[KINDS[entry["dtype"]][0]] += end - start
    if not any(sizes.values()):
        raise Incompatible("the model's files hold no float32, float16 or bfloat16")
    return max(sizes, key=lambda kind: sizes[kind])
