"""Tensors as a safetensors file, written one after the other: the bytes of all are never in memory together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from backends.interface import FloatArray


def tensor_pieces(tensors: Mapping[str, FloatArray]) -> Iterator[bytes | memoryview]:
    """The header and then each tensor, as float32: together the bytes that safetensors itself writes, without metadata.

    Format: https://huggingface.co/docs/safetensors, "Format"; the library sorts tensors of one type by name, and pads
    the header with spaces to a multiple of 8 bytes.
    """
    names, header, start = sorted(tensors), {}, 0
    for name in names:
        end = start + 4 * tensors[name].size
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield np.asarray(tensors[name], "<f4", order="C").reshape(-1).view(np.uint8).data
