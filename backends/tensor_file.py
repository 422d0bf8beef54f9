"""Reads single tensors from a safetensors file as float32, with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray

NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # a type of the format, as numpy reads it


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
    if facts["dtype"] not in NUMBERS:
        raise ValueError(f"{name:.200} holds numbers of type {facts['dtype']}")
    begin, end = facts["data_offsets"]
    kind = np.dtype(NUMBERS[facts["dtype"]])
    numbers = np.fromfile(file, kind, (end - begin) // kind.itemsize, offset=start + begin)
    if facts["dtype"] == "BF16":  # the upper half of a float32
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    whole: FloatArray = numbers.astype(np.float32, copy=False).reshape(facts["shape"])
    return whole


def read_tensors(file: Path) -> dict[str, FloatArray]:
    """Every tensor, as `read_tensor` reads it."""
    header = read_header(file)
    return {name: read_tensor(file, name, header) for name in header[0]}
