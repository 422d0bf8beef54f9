import json
from pathlib import Path
from typing import Any

import pytest

from backends.config_keys import legacy_rope
from backends.model_folder import ModelFolder


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"rope_theta": 5e5}, {}),
        ({"rope_parameters": None}, {}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            },
        ),
        (
            {"rope_parameters": {"type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0}},
        ),
    ],
)
def test_rope_parameters_are_said_in_the_older_keys(config: dict[str, Any], older: dict[str, Any]) -> None:
    assert legacy_rope(config) == older


def test_longrope_keeps_its_original_length_beside_the_factors() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    older = legacy_rope({"rope_parameters": rope | factors})
    assert older["original_max_position_embeddings"] == 64
    assert older["rope_scaling"]["type"] == "longrope"
    assert older["rope_scaling"]["original_max_position_embeddings"] == 64
    assert older["rope_scaling"].items() >= factors.items()


def test_two_kinds_of_layer_give_two_bases_and_the_pattern() -> None:
    config = {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert legacy_rope(config) == {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 3,
    }


def test_a_nested_text_model_is_repaired_where_it_is() -> None:
    text = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    assert legacy_rope({"text_config": text}) == {"text_config": text | {"rope_theta": 1e9, "rope_scaling": None}}


def test_reading_a_config_adds_the_older_keys_and_changes_nothing_else(tmp_path: Path) -> None:
    written = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert ModelFolder.open(tmp_path).config == written | {"rope_theta": 5e5, "rope_scaling": None}
