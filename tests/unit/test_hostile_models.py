"""Model folders with code, pickles and false claims, under the real libraries."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec
from backends.model_folder import ModelFolder
from backends.untrusted import validate
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RecipeError
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Model
from tests.unit.hostile import harmless, no_network, refused  # noqa: F401

REAL = [name for name in registry.NAMES if name != "reference"]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    return model_with_tokenizer(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture(params=registry.NAMES)
def load(request: pytest.FixtureRequest, base: Path) -> Callable[..., Any]:
    """Opens a folder in a backend, whose libraries have been used once before any bound on memory."""
    name = request.param
    if reason := registry.probe(name):
        pytest.skip(reason)

    def opened(folder: Path, **settings: Any) -> Any:
        spec = ModelSpec(folder, dtype="float32", device="cpu", **settings)
        return registry.open_session(name, spec, LoraSpec(2, 4.0), OptimSpec(), 0)

    opened(base)
    opened.__name__ = name
    return opened


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(ModelFolder.open(folder))


class _Writes:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_an_honest_folder_loads(load: Callable[..., Any], folder: Path) -> None:
    assert refused(load, folder) is None


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weights", "alone"])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin", "model.pt"]
)
def test_pickles_are_never_opened(load: Callable[..., Any], folder: Path, name: str, beside: bool) -> None:
    (folder / name).write_bytes(pickle.dumps(_Writes(folder / "written")))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    if not beside:
        (folder / "model.safetensors").unlink()
    message = refused(load, folder)
    assert (message is None) == (beside or load.__name__ == "reference")  # which makes its own weights
    assert not (folder / "written").exists()


CLAIMS: dict[str, dict[str, Any]] = {
    "blocks": {"num_hidden_layers": 10**9}, "width": {"hidden_size": 10**9}, "words": {"vocab_size": 2**40},
    "heads": {"num_attention_heads": 10**8}, "inner": {"intermediate_size": 10**12}, "text": {"vocab_size": "many"},
    "negative": {"hidden_size": -64}, "none": {"num_hidden_layers": 0.5}, "kind": {"model_type": "../../x"},
    "no kind": {"model_type": "nothing-known"}, "kind list": {"model_type": ["llama"]}, "list": {"hidden_size": [64]},
    "file": {"transformers_weights": "../../canary.safetensors"}, "kernel": {"attn_implementation": "who/kernel"},
    "rope": {"rope_parameters": {"full_attention": 3}}, "rope list": {"rope_parameters": {"rope_type": ["x"]}},
    "quantised list": {"quantization_config": [1]}, "scaling text": {"rope_scaling": "yarn"},
    "positions text": {"max_position_embeddings": "many"}, "window text": {"sliding_window": "wide"},
    "layers text": {"layer_types": "full"}, "nested number": {"text_config": 3}, "architecture": {"architectures": "x"},
    "other width": {"hidden_size": 32}, "no heads": {"num_attention_heads": 0}, "odd heads": {"num_attention_heads": 3},
}  # fmt: skip
# The reference backend knows modules and words alone.
OF_THE_MODEL = {"no kind", "rope list", "other width", "no heads", "odd heads"}


@pytest.mark.parametrize("claim", CLAIMS)
def test_false_claims(load: Callable[..., Any], folder: Path, claim: str) -> None:
    change(folder, **CLAIMS[claim])
    message = refused(load, folder)
    assert message or (load.__name__ == "reference" and claim in OF_THE_MODEL)


def test_a_base_that_names_another_is_refused(load: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "canary").mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "canary")}))
    assert "adapter_config.json" in (refused(load, folder) or "")


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise ImportError('it ran')"


def coded(folder: Path, how: str) -> None:
    """A model whose code writes `ran` beside itself."""
    (folder / "custom.py").write_text(CODE)
    if how == "model_file":
        change(folder, model_file="custom.py")
    else:
        change(folder, model_type="custom", auto_map={"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"})


@pytest.mark.parametrize(("name", "how"), [("torch", "auto_map"), ("mlx", "model_file")])
def test_code_of_a_model_runs_only_on_the_recipes_word(
    folder: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if reason := registry.probe(name):
        pytest.skip(reason)
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    coded(folder, how)
    spec, lora = ModelSpec(folder, dtype="float32", device="cpu"), LoraSpec(2, 4.0)
    message = refused(registry.open_session, name, spec, lora, OptimSpec(), 0)
    assert "model.remote_code: true" in (message or "")
    assert not list(tmp_path.rglob("ran"))
    trusted = ModelSpec(folder, dtype="float32", device="cpu", remote_code=True)
    message = refused(registry.open_session, name, trusted, lora, OptimSpec(), 0)
    assert "it ran" in (message or "")  # which shows that the canary above can sing
    assert list(tmp_path.rglob("ran"))


def test_code_of_a_tokenizer_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "custom.py").write_text(CODE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "model.remote_code: true" in (refused(tokenizer_of, folder) or "model.remote_code: true")
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "key", ["vocab_file", "tokenizer_file", "merges_file", "name_or_path", "special_tokens_map_file"]
)
def test_a_tokenizer_config_leads_to_no_other_file(folder: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "canary.json").write_text("{}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {key: str(tmp_path / "canary.json")}))
    tokenizer_of(folder)
    with harmless():
        tokenizer_of(folder)


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_code_from_the_hub_needs_the_commit_that_was_read(revision: str | None) -> None:
    with pytest.raises(RecipeError, match=r"model\.revision"):
        model_folder(Model(path="who/what", remote_code=True, revision=revision))


def test_a_pipe_is_no_weight_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert refused(validate, tmp_path / "model.safetensors")
