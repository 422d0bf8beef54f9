"""Messages between the processes of a run: JSON and arrays, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from backends.interface import Batch, Scores, TrainState

Arrays = Mapping[str, NDArray[Any]]
_PARTS = ("inputs", "targets", "weights")


def pack(header: Mapping[str, Any], arrays: Arrays | None = None) -> bytes:
    """Eight bytes that say how long the JSON is, the JSON, and the arrays as safetensors."""
    text = json.dumps(header).encode()
    contiguous = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    return len(text).to_bytes(8, "little") + text + (save(contiguous) if contiguous else b"")


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    end = 8 + int.from_bytes(message[:8], "little")
    header: dict[str, Any] = json.loads(message[8:end])
    return header, load(message[end:]) if len(message) > end else {}


def batch_arrays(batch: Batch, number: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A batch as (JSON, arrays); the arrays' names begin with its number."""
    arrays: dict[str, NDArray[Any]] = {f"{number}.{part}": getattr(batch, part) for part in _PARTS}
    arrays |= {f"{number}.prefix{i}": prefix for i, prefix in enumerate(batch.prefixes)}
    header = {"prefixes": len(batch.prefixes), "prefix_of": batch.prefix_of, "rows": batch.rows}
    return header | {"rowless": batch.rowless}, arrays


def batch_of(header: Mapping[str, Any], arrays: Arrays, number: int) -> Batch:
    """The batch that `batch_arrays` wrote."""
    inputs, targets, weights = (arrays[f"{number}.{part}"] for part in _PARTS)
    prefixes = tuple(arrays[f"{number}.prefix{i}"] for i in range(header["prefixes"]))
    return Batch(inputs, targets, weights, prefixes, *(tuple(header[k]) for k in ("prefix_of", "rows", "rowless")))


def scores_arrays(scores: Scores) -> dict[str, NDArray[Any]]:
    return {"logprob": scores.logprob, "greedy": scores.greedy}


def state_arrays(state: TrainState) -> dict[str, NDArray[Any]]:
    adapter = {f"adapter.{name}": tensor for name, tensor in state.adapter.items()}
    return adapter | {f"moments.{name}": tensor for name, tensor in state.moments.items()}


def state_of(step: int, arrays: Arrays) -> TrainState:
    """The state that `state_arrays` wrote."""
    adapter, moments = (
        {name.removeprefix(kind): tensor for name, tensor in arrays.items() if name.startswith(kind)}
        for kind in ("adapter.", "moments.")
    )
    return TrainState(step, adapter, moments)


def digest(state: TrainState) -> bytes:
    """Of every byte that training changes. 8 bytes"""
    arrays: Sequence[tuple[str, NDArray[Any]]] = sorted(state_arrays(state).items())
    total = blake2b(state.step.to_bytes(8, "little"), digest_size=8)
    for name, array in arrays:
        total.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return total.digest()
