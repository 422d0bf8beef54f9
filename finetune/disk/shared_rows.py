"""The prepared training rows in a file, from rank 0 to the other processes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from finetune.data.rows import Example
from finetune.disk.atomic import disk_errors, write_pieces
from finetune.errors import Incompatible

NAME = "training-rows.safetensors"  # in the run's folder, until every process has read it


def write_rows(folder: Path, examples: Sequence[Example]) -> str:
    """The SHA-256 of the file. Raises DiskError."""
    parts = {
        "lengths": np.array([len(example) for example in examples], np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)]),
        "weights": np.concatenate([np.zeros(0, np.float32), *(example.weights for example in examples)]),
    }
    content = save({name: np.ascontiguousarray(part) for name, part in parts.items()})
    write_pieces(folder / NAME, [content])
    return sha256(content).hexdigest()


def content_of(folder: Path) -> bytes | None:
    """The file as it is; None where this machine does not have it. Raises DiskError."""
    file = folder / NAME
    with disk_errors(file):
        return file.read_bytes() if file.is_file() else None


def read_rows(content: bytes, digest: str) -> list[Example]:
    """The rows, without their texts. Raises Incompatible where they are not those that were written."""
    try:
        if sha256(content).hexdigest() != digest:
            raise ValueError("another hash than process 0 says")
        parts = load(content)
        ends = np.cumsum(parts["lengths"])[:-1]
        tokens, weights = np.split(parts["tokens"], ends), np.split(parts["weights"], ends)
    except (ValueError, KeyError, SafetensorError) as error:
        raise Incompatible(f"{NAME}: not the rows that process 0 wrote ({error}); start the run again") from None
    return [Example(*row, location="") for row in zip(tokens, weights, strict=True)]


def remove_rows(folder: Path) -> None:
    with disk_errors(folder / NAME):
        (folder / NAME).unlink(missing_ok=True)
