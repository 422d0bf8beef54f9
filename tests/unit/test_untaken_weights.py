"""Weights of the language model that no layer takes: refused by one sentence on both backends, others are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends import registry
from backends.interface import BackendError, LoraSpec, ModelSpec, OptimSpec
from tests.tiny_families import published
from tests.tiny_models import tiny_llama

LORA = LoraSpec(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def beside(model: Path, folder: Path, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Path:
    """The model with more tensors, a dot for each two underlines, and other keys in its config."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    added = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def opened(backend: str, folder: Path) -> None:
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    registry.open_session(backend, ModelSpec(folder, device="cpu"), LORA, OptimSpec(), 0)


STRAY: dict[str, dict[str, tuple[int, ...]]] = {
    "norms of heads": {f"model__layers__{n}__self_attn__{part}_norm__weight": (16,) for n in (0, 1) for part in "qk"},
    "a bias": {"model__layers__1__self_attn__q_proj__bias": (64,)},
    "a layer": {"model__layers__0__mlp__extra_proj__weight": (64, 64)},
    "beside the blocks": {"model__second_norm__weight": (64,)},
}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("kind", STRAY)
def test_weights_that_no_layer_takes_are_refused(tmp_path: Path, llama: Path, backend: str, kind: str) -> None:
    folder = beside(llama, tmp_path / "model", **STRAY[kind])
    with pytest.raises(BackendError) as caught:
        opened(backend, folder)
    said, library = str(caught.value), {"torch": "transformers", "mlx": "mlx-lm"}[backend]
    assert said.startswith(f"{folder}: model.safetensors: no layer of {library}'s model takes model.")
    assert next(iter(STRAY[kind])).replace("__", ".") in said and "download both again" in said
    assert "\n" not in said


@pytest.mark.parametrize("form", ["experts", "layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"])
def test_weights_in_another_form_are_not_blamed_on_the_download(tmp_path: Path, llama: Path, form: str) -> None:
    if form == "experts":
        folder, name = published("gpt_oss", tmp_path / "model"), "model.layers.0.mlp.experts.down_proj"
    else:
        name = f"model.{form}"
        folder = beside(llama, tmp_path / "model", **{name.replace(".", "__"): (64,)})
    with pytest.raises(BackendError) as caught:
        opened("mlx", folder)
    said = str(caught.value)
    assert f"mlx-lm does not take {name}" in said and "in the form in which these files hold" in said
    assert "as its makers publish it" in said and "another backend" in said and "download" not in said


HONEST: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "rotary frequencies": ({}, {f"model__layers__{n}__self_attn__rotary_emb__inv_freq": (8,) for n in (0, 1)}),
    "a head that is tied": ({"tie_word_embeddings": True}, {}),
    "a block that predicts further tokens": ({}, {
        "model__layers__2__eh_proj__weight": (64, 128), "model__layers__2__self_attn__q_proj__weight": (64, 64),
    }),
    "a head of another task": ({}, {"score__weight": (2, 64)}),
    "a tower": ({}, {"vision_tower__encoder__layers__0__self_attn__q_norm__weight": (64,)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HONEST)
def test_what_is_left_out_rightly_is_not_refused(tmp_path: Path, llama: Path, kind: str) -> None:
    config, shapes = HONEST[kind]
    opened("torch", beside(llama, tmp_path / "model", config, **shapes))
