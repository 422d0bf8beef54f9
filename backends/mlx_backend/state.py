"""Training state in MLX: float32, the adapter in mlx-lm's layout (every matrix transposed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from backends.interface import FloatArray
from backends.mlx_backend.optim import Tensors


class State(NamedTuple):
    """Replaced as one, so that an interruption cannot leave half of a step."""

    step: int
    adapter: Tensors
    moments: Tensors


def to_numpy(tensors: Tensors, transposed: bool) -> dict[str, FloatArray]:
    """Copies in PEFT's layout, or the checkpoint's. transposed: whether MLX holds them so."""
    arrays = ((name, np.array(value)) for name, value in tensors.items())  # copies
    return {name: value.T.copy() if transposed else value for name, value in arrays}


def to_mlx(tensors: Mapping[str, FloatArray], transposed: bool) -> Tensors:
    return {name: mx.array(np.ascontiguousarray(value.T if transposed else value)) for name, value in tensors.items()}
