"""What config and headers tell of usual models is what the libraries build; what is not usual is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import registry, usual_families
from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.model_folder import ModelFolder

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
from backends.mlx_backend.tree import check_taken, parts_of
from backends.torch_backend.tree import tree_of
from tests.tiny_families import published
from tests.tiny_models import family

LORA = LoraSpec(4, 8.0)


@pytest.mark.parametrize("name", usual_families._FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_libraries_build_what_is_plain_under_the_same_names(name: str, tied: bool, tmp_path: Path) -> None:
    folder = ModelFolder.open(family(name, tmp_path, tie_word_embeddings=tied))
    assert usual_families.is_plain(folder)
    modules = folder.lora_modules(LORA)
    assert len(modules) == 14 and tree_of(folder).linear.items() >= modules.items()
    check_taken(folder)
    for module, parts in parts_of(folder, modules).items():
        assert [(part.name, part.first, part.last) for part in parts] == [(module, 0, modules[module][0])]


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi3", "olmo2", "granite"])
def test_other_families_are_asked_of_the_libraries(name: str, tmp_path: Path) -> None:
    assert not usual_families.is_plain(ModelFolder.open(family(name, tmp_path)))


def test_a_model_inside_another_is_asked_of_the_libraries(tmp_path: Path) -> None:
    assert not usual_families.is_plain(ModelFolder.open(published("mistral3", tmp_path)))


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "no such"},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": "small"},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"a key that nobody knows": 1},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"layer_types": ["full_attention"]},
    ],
    ids=str,
)
def test_what_is_not_usual_is_asked_of_the_libraries(
    said: dict[str, Any], llama: Callable[[dict[str, Any]], Path]
) -> None:
    assert usual_families.is_plain(ModelFolder.open(llama({})))
    assert not usual_families.is_plain(ModelFolder.open(llama(said)))


def test_what_is_plain_is_refused_all_the_same_where_it_has_no_such_layer(
    llama: Callable[[dict[str, Any]], Path],
) -> None:
    registry.check_model("torch", ModelSpec(llama({})), LORA)
    with pytest.raises(BackendError, match="no linear layer named qkv_proj"):
        registry.check_model("torch", ModelSpec(llama({})), LoraSpec(4, 8.0, targets=("qkv_proj",)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(tiny: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A folder of a tiny Llama whose config says this too."""

    def made(said: dict[str, Any]) -> Path:
        config = json.loads((tiny / "config.json").read_text()) | said
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "model.safetensors").hardlink_to(tiny / "model.safetensors")
        return tmp_path

    return made
