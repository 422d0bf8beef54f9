"""Adapters that others made, as the start of a run: read as they are, or refused with what to set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from backends.interface import LoraSpec
from backends.model_folder import ModelFolder
from finetune.disk.adapter import check_start, read_adapter
from finetune.errors import Incompatible

torch = pytest.importorskip("torch")

from tests.tiny_models import tiny_llama  # noqa: E402

LORA = LoraSpec(4, 8.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder.open(tiny_llama(tmp_path_factory.mktemp("base")))


def adapter(folder: Path, base: ModelFolder, lora: LoraSpec, dtype: torch.dtype = torch.float32) -> dict:
    """A PEFT folder with random tensors of that type; those tensors, as float32."""
    from safetensors.torch import save_file as save

    made = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (outputs, inputs) in base.lora_modules(lora).items():
        for part, shape in (("A", (lora.rank, inputs)), ("B", (outputs, lora.rank))):
            name = f"base_model.model.{module}.lora_{part}.weight"
            tensors[name] = torch.randn(shape, generator=made).to(dtype)
    folder.mkdir(exist_ok=True)
    save(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return {name: value.float().numpy() for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_numbers_of_every_usual_type_are_read_exactly(dtype: torch.dtype, tmp_path: Path, base: ModelFolder) -> None:
    expected = adapter(tmp_path, base, LORA, dtype)
    found = read_adapter(tmp_path).tensors
    assert len(found) == len(expected)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[f"base_model.model.{name}.weight"])


def test_numbers_of_another_type_are_named_with_the_file(tmp_path: Path, base: ModelFolder) -> None:
    adapter(tmp_path, base, LORA)
    save_file({"base_model.model.q.lora_A.weight": np.zeros((4, 8), np.int16)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Incompatible, match=r"adapter_model.safetensors: cannot be read.*numbers of type I16"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "remedy"),
    [
        (LoraSpec(4, 8.0, targets=("q_proj", "v_proj")), "set lora.targets: [q_proj, v_proj]"),
        (LoraSpec(4, 8.0, targets=("down_proj",)), "set lora.targets: [down_proj]"),
        (LoraSpec(4, 8.0, targets=("o_proj",), layers=1), "set lora.targets: [o_proj] and lora.layers: 1"),
    ],
)
def test_other_targets_are_refused_with_the_keys_that_fit(
    theirs: LoraSpec, remedy: str, tmp_path: Path, base: ModelFolder
) -> None:
    adapter(tmp_path, base, theirs)
    with pytest.raises(Incompatible) as caught:
        check_start(tmp_path, base, LORA)
    assert str(caught.value).endswith(remedy)
    check_start(tmp_path, base, theirs)


def test_layers_that_the_model_does_not_have_are_refused(tmp_path: Path, base: ModelFolder) -> None:
    adapter(tmp_path, base, LORA)
    tensors = {f"model.layers.7.q_proj.lora_{part}.weight": np.zeros((4, 4), np.float32) for part in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Incompatible, match="give one of this model's layers"):
        check_start(tmp_path, base, LORA)
