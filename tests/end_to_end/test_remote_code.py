"""A model that comes with code of its own, through `check` and `train`: only where the recipe says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.command import Work, reviews

FOR_TORCH = """\
from transformers import LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "own_llama"


class Model(LlamaForCausalLM):
    config_class = Config
"""
FOR_MLX = "from mlx_lm.models.llama import Model, ModelArgs\n"
RECIPE = """\
data: {train: train.jsonl, test: test.jsonl}
train: {steps: 3, batch_size: 4, learning_rate: 1e-2}
"""


@pytest.fixture
def coded(tmp_path: Path, tiny_model: Path) -> Work:
    """A Llama under another name, which neither library knows."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "own-llama"))
    (folder / "for_torch.py").write_text(FOR_TORCH)
    (folder / "for_mlx.py").write_text(FOR_MLX)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_llama",
        "architectures": ["Model"],
        "auto_map": {"AutoConfig": "for_torch.Config", "AutoModelForCausalLM": "for_torch.Model"},
        "model_file": "for_mlx.py",
    }
    (folder / "config.json").write_text(json.dumps(config))
    work = Work(tmp_path / "work", folder)
    work.env["HF_MODULES_CACHE"] = str(tmp_path / "modules")  # where transformers copies the code
    work.lines("train.jsonl", reviews(0, 26))
    work.lines("test.jsonl", reviews(100, 9))
    work.recipe(RECIPE)
    return work


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"], indirect=True)
def test_a_model_with_code_of_its_own_is_checked_and_trained(coded: Work, backend: str) -> None:
    allowed = ("recipe.yaml", "model.remote_code=true")
    check, train = coded.several(("check", *allowed), ("train", *allowed, "--backend", backend))
    assert "trainable parameters" in check.good().out
    assert "accuracy" in train.good().out
    (run,) = coded.runs()
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "environment.json").read_text())["remote_code"] is True


def test_its_code_needs_the_recipes_word(coded: Work) -> None:
    for answer in coded.several(("check", "recipe.yaml"), ("train", "recipe.yaml", "--backend", "reference")):
        assert "set model.remote_code: true" in answer.failed(7)
    assert not coded.runs()
