"""Rotary embeddings in MLX turn as transformers' do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")

from mlx_lm.models.rope_utils import initialize_rope  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from backends.config_keys import legacy_rope  # noqa: E402
from backends.mlx_backend.rotary import as_transformers_rotates  # noqa: E402


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"truncate": False}, 64),
        ({"truncate": False, "factor": 8.0, "original_max_position_embeddings": 128}, 16),
        ({"truncate": False, "beta_fast": 4.0, "beta_slow": 2.0}, 32),
        ({"truncate": True}, 64),
        ({}, 16),
    ],
)
def test_yarn_rounds_the_ends_of_its_ramp_only_where_it_should(settings: dict[str, Any], width: int) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0} | settings
    config = AutoConfig.for_model("llama", head_dim=width, max_position_embeddings=65536, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    older = {"rope_theta": 150000.0, **legacy_rope({"rope_parameters": rope})}
    module = initialize_rope(width, older["rope_theta"], False, older["rope_scaling"])
    as_transformers_rotates(_Holding(module), older)
    np.testing.assert_allclose(1 / np.array(module._freqs), expected.numpy(), rtol=1e-5)


class _Holding:
    def __init__(self, module: Any) -> None:
        self._module = module

    def modules(self) -> list[Any]:
        return [self._module]
