"""What training changes, as MLX holds it: float32, in mlx-lm's layout (every matrix transposed)."""

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


def to_numpy(tensors: Tensors) -> dict[str, FloatArray]:
    """Copies in PEFT's layout."""
    return {name: np.array(value).T.copy() for name, value in tensors.items()}


def to_mlx(tensors: Mapping[str, FloatArray]) -> Tensors:
    return {name: mx.array(np.ascontiguousarray(value.T)) for name, value in tensors.items()}
