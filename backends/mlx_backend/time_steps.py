"""Mamba's time steps where mlx-lm differs from transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

_SHORTEST = 0.001  # of Nemotron-H, where its config does not say it


def as_transformers_steps(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Nemotron-H's steps are at least `time_step_min`, as transformers has them; mlx-lm reads `time_step_limit`."""
    if config.get("model_type") != "nemotron_h":
        return
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (float(config.get("time_step_min") or _SHORTEST), math.inf)
