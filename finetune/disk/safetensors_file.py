"""Tensors to and from a safetensors file; written one after the other, so that never the bytes of all are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray

_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def tensor_pieces(tensors: Mapping[str, FloatArray]) -> Iterator[bytes | memoryview]:
    """The header and then each tensor, as float32: together the bytes that safetensors itself writes, without metadata.

    The library sorts tensors of one type by name.
    """
    names = sorted(tensors)
    yield header_bytes({name: tensors[name].shape for name in names}, "F32")
    for name in names:
        yield np.asarray(tensors[name], "<f4", order="C").reshape(-1).view(np.uint8).data


def header_bytes(shapes: Mapping[str, Sequence[int]], kind: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file begins with whose tensors have these shapes and this type ("F32", "F16", "BF16"), in this order.

    Format: https://huggingface.co/docs/safetensors, "Format"; the library pads the header with spaces to a multiple of
    8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start, width = 0, np.dtype(_NUMBERS[kind]).itemsize
    for name, shape in shapes.items():
        end = start + width * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Each tensor's entry, and where the tensors begin. Of a file that was validated."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size


def read_tensor(file: Path, name: str, header: tuple[Mapping[str, Any], int] | None = None) -> FloatArray:
    """A tensor as float32, of a file that was validated: bfloat16, which numpy does not have, too. No other is read.

    Raises ValueError for numbers of another kind, naming the tensor.
    """
    entries, start = header or read_header(file)
    facts = entries[name]
    if facts["dtype"] not in _NUMBERS:
        raise ValueError(f"{name:.200} holds numbers of type {facts['dtype']}")
    begin, end = facts["data_offsets"]
    kind = np.dtype(_NUMBERS[facts["dtype"]])
    numbers = np.fromfile(file, kind, (end - begin) // kind.itemsize, offset=start + begin)
    if facts["dtype"] == "BF16":  # the upper half of a float32
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    whole: FloatArray = numbers.astype(np.float32, copy=False).reshape(facts["shape"])
    return whole


def read_tensors(file: Path) -> dict[str, FloatArray]:
    """Every tensor, as `read_tensor` reads it."""
    header = read_header(file)
    return {name: read_tensor(file, name, header) for name in header[0]}
