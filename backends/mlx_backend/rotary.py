"""Rotary embeddings where mlx-lm differs from transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE


def as_transformers_rotates(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Changes a loaded model's embeddings by its config."""
    scaling = config.get("rope_scaling") or {}
    for module in model.modules():
        if isinstance(module, SuScaledRoPE) and "short_factor" in scaling:
            ratio = mx.array(scaling["short_factor"]) / mx.array(scaling["long_factor"])
            module._short_freqs = module._freqs * ratio
            module.__class__ = _LongRope
        if isinstance(module, YarnRoPE) and scaling.get("truncate") is False:
            module._freqs = _exact_yarn(module.dims, float(config["rope_theta"]), scaling)


class _LongRope(SuScaledRoPE):  # type: ignore[misc]
    """Rotary embedding with its short factors up to the original length (Ding et al., 2024), as transformers has it.

    mlx-lm takes the long factors at every length.
    """

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        long = x.shape[-2] + offset > self.original_max_position_embeddings
        scaled = x.at[..., : self.dim].multiply(self._scale)
        freqs = self._freqs if long else self._short_freqs
        rotated: mx.array = mx.fast.rope(
            scaled, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs
        )
        return rotated


def _exact_yarn(width: int, base: float, scaling: Mapping[str, Any]) -> mx.array:
    """YaRN (Peng et al., 2023) without whole numbers for the ends of its ramp, as gpt-oss has it. [width / 2]

    mlx-lm always rounds them, and does not read the key `truncate`.
    """
    original, factor = scaling.get("original_max_position_embeddings", 4096), scaling["factor"]

    def turned(rotations: float) -> float:
        """The dimension that rotates so often within the original length."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(turned(scaling.get("beta_fast") or 32), 0.0)
    high = min(turned(scaling.get("beta_slow") or 1), width - 1.0)
    ramp = mx.clip((mx.arange(width // 2) - low) / (high - low or 0.001), 0, 1)  # 1: stretched, 0: as it was
    plain = base ** (mx.arange(0, width, 2) / width)
    freqs: mx.array = plain / (ramp / factor + 1 - ramp)
    return freqs
