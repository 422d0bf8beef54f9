"""Writes a safetensors file tensor by tensor, so that they need not all be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from backends.interface import FloatArray
from backends.model_folder import NUMBERS


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
    start, width = 0, np.dtype(NUMBERS[kind]).itemsize
    for name, shape in shapes.items():
        end = start + width * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
