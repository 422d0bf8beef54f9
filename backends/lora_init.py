"""The adapter every backend starts from: a function of the seed and the module's name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from backends.interface import FloatArray


def initial_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, FloatArray]:
    """A uniform in +-1/sqrt(in) [r, in], as PEFT and mlx-lm draw it; B zero [out, r], so training starts at the base.

    `shapes` maps a module to (out, in). Each module has its own generator, so adding or leaving out
    one module changes no other.
    """
    adapter: dict[str, FloatArray] = {}
    for module, (outputs, inputs) in shapes.items():
        digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        bound = 1.0 / np.sqrt(inputs)
        adapter[f"{module}.lora_A"] = rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        adapter[f"{module}.lora_B"] = np.zeros((outputs, rank), dtype=np.float32)
    return adapter
