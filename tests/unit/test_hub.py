"""A model of the hub: what is downloaded, in which order, and what is refused before its weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from backends.interface import BackendError
from backends.usual_families import EXAMPLE
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Model
from finetune.training.job import find_folder
from tests.unit.toy_run import recipe

COMMIT = "0123456789" * 4
CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
INDEX, SHARDS = "model.safetensors.index.json", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COPIES = ("consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
ROOT = Path(__file__).parents[2]


class Hub:
    """Gives one model: files by name, which `snapshot_download` copies to a folder as the hub's cache has it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any]) -> None:
        self.files = {"config.json": CONFIG, "tokenizer.json": {}, **{copy: {} for copy in COPIES}} | files
        self.snapshot = folder / "models--who--what" / "snapshots" / COMMIT
        self.calls: list[tuple[str | None, list[str]]] = []  # revision, and what was new
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def _download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "who/what"
        wanted = [*filter_repo_objects(self.files, allow_patterns=allow_patterns)]
        new = [file for file in wanted if not (self.snapshot / file).exists()]
        for file in new:
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (self.snapshot / file).write_text(json.dumps(self.files[file]))
        self.calls.append((revision, new))
        return str(self.snapshot)

    @property
    def weights(self) -> list[str]:
        """Which files of weights were downloaded."""
        return sorted(file for _, new in self.calls for file in new if file.endswith((".safetensors", ".bin")))


def index(*tensors: str) -> dict[str, Any]:
    return {"weight_map": {name: SHARDS[number % 2] for number, name in enumerate(tensors)}}


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({"model.safetensors": {}}, ["model.safetensors"]),
        (
            {INDEX: index("a", "b"), **{shard: {} for shard in SHARDS}, "model-00001-of-00003.safetensors": {}},
            [*SHARDS],
        ),
        ({"config.json": CONFIG | {"transformers_weights": "model.fp16.safetensors"}}, ["model.fp16.safetensors"]),
        ({}, []),
    ],
    ids=["one file", "shards", "a named file", "none"],
)
def test_only_the_weights_that_are_used_are_downloaded(
    files: dict[str, Any], used: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, monkeypatch, files)
    assert model_folder(Model(path="who/what", revision="main")) == hub.snapshot
    assert hub.weights == used
    assert [revision for revision, _ in hub.calls] == ["main", COMMIT]
    model_folder(Model(path="who/what"))
    assert len(hub.calls) == (3 if used else 4)  # weights that are there are not asked for again


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "FP8": ("torch", {"config.json": CONFIG | {"quantization_config": {"quant_method": "fp8"}}},
            "quantised by FP8, .*-bnb-4bit"),
    "FP8 on MLX": ("mlx", {"config.json": CONFIG | {"quantization_config": {"quant_method": "fp8"}}},
                   "quantised by FP8, .*mlx-community"),
    "GPTQ's own file": ("torch", {"quantize_config.json": {}}, "quantised by GPTQ"),
    "tensors of the index": ("torch", {INDEX: index("a.weight", "a.weight_scale_inv")}, "quantised by FP8"),
    "no such model": ("torch", {"config.json": {"model_type": "none_such"}}, f"none_such; .*such as {EXAMPLE}"),
    "no such model on MLX": ("mlx", {"config.json": {"model_type": "none_such"}}, f"none_such.*such as {EXAMPLE}"),
    "no text": ("torch", {"config.json": {"model_type": "vit"}}, f"model_type vit; .*such as {EXAMPLE}"),
    "torch alone has it": ("mlx", {"config.json": {"model_type": "arcee"}}, "arcee.*; set backend: torch, which"),
    "MLX alone has it": ("torch", {"config.json": {"model_type": "plamo2"}}, "plamo2; set backend: mlx, which"),
    "code": ("torch", {"config.json": {"model_type": "own", "auto_map": {}}}, "set model.remote_code: true"),
    "an index that asks for all": ("torch", {INDEX: {"weight_map": {"a": "*"}}}, "not the bare name"),
    "an adapter": ("torch", {"adapter_config.json": {}}, "an adapter's folder"),
    "sizes that nothing confirms": ("torch", {"config.json": {"model_type": "vit", "num_hidden_layers": 10**12}},
                                    "model_type vit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_are_downloaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    backend, files, words = REFUSED[kind]
    hub = Hub(tmp_path, monkeypatch, {"model.safetensors": {}, **{shard: {} for shard in SHARDS}} | files)
    with pytest.raises(BackendError, match=words) as caught:
        find_folder(recipe(model={"path": "who/what"}, backend=backend))
    assert hub.calls and not hub.weights
    assert "\n" not in str(caught.value)


def test_what_a_run_was_trained_on_is_not_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, monkeypatch, {"config.json": {"model_type": "none_such"}, "model.safetensors": {}})
    with pytest.raises(BackendError, match="not a whole safetensors file"):
        find_folder(recipe(model={"path": "who/what"}, backend="torch"), trained=True)
    assert hub.weights == ["model.safetensors"]


def test_the_model_that_is_named_in_the_place_of_others_is_one_of_the_starting_recipes() -> None:
    assert any(f"path: {EXAMPLE}\n" in file.read_text() for file in (ROOT / "configs").glob("*.yaml"))
