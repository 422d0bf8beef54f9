"""What a text of a recipe names: the disk is asked first, and only what is not there is judged by how it is written."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from finetune.errors import DataError, EnvironmentProblem, RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.locate import model_folder
from finetune.recipe.names import local
from finetune.recipe.schema import Model, Recipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"
MODELS = (
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B-Instruct",
    "mlx-community/Qwen3-0.6B-4bit", "HuggingFaceTB/SmolLM2-135M", "mistralai/Mistral-7B-v0.3", "01-ai/Yi-1.5-6B",
    "google/gemma-3-1b-it", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "a_b/c.d_e-f.1",
)  # fmt: skip
SETS = (
    "acme/support-v1.5", "acme/support-v1.5:test", "imdb", "imdb:train[:10%]", "stanfordnlp/imdb", "acme/set/v1.1",
    "acme/set/plain_text:validation", "cais/mmlu/all:test", "HuggingFaceH4/ultrachat_200k:train_sft",
)  # fmt: skip


def loaded(folder: Path, overrides: tuple[str, ...] = (), **keys: str) -> Recipe:
    model, train = keys.get("model", "m"), keys.get("train", "t.jsonl")
    start = f"lora: {{start_from: '{keys['start']}'}}\n" if "start" in keys else ""
    (folder / "recipe.yaml").write_text(f"model: {{path: '{model}'}}\ndata: {{train: '{train}'}}\n{start}")
    return load_recipe(folder / "recipe.yaml", overrides)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with no network beside it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, name: str) -> Path:
    """A model in the cache, as a download leaves it."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    return folder / "snapshots" / COMMIT


@pytest.mark.parametrize("name", MODELS)
def test_a_models_hub_id_reaches_the_hub(tmp_path: Path, hub: Path, name: str) -> None:
    recipe = loaded(tmp_path, model=name)
    assert recipe.model.path == name
    folder = put(hub, name)
    assert model_folder(recipe.model) == folder


@pytest.mark.parametrize("name", SETS)
def test_a_data_sets_hub_id_stays_one(tmp_path: Path, name: str) -> None:
    recipe = loaded(tmp_path, train=name, overrides=(f"data.valid={name}", f"data.test={name}"))
    assert (recipe.data.train, recipe.data.valid, recipe.data.test) == (name, name, name)


def recipes() -> dict[str, str]:
    """README's recipe and every shipped one."""
    (shown,) = re.findall(r"```yaml\n(model:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return {"README": shown} | {config.stem: config.read_text() for config in CONFIGS}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_that_is_shown_names_what_is_there(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from finetune.data.read import read

    file = tmp_path / "recipe.yaml"
    file.write_text(recipes()[name])
    recipe = load_recipe(file)
    if not recipe.model.path.startswith("builtin:"):
        put(hub, recipe.model.path)
    assert (model_folder(recipe.model) / "config.json").exists()
    path = local(recipe.data.train, tmp_path)
    if path is not None:
        assert str(path) == recipe.data.train
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a"}\n' if path.suffix == ".jsonl" else "review,sentiment\na,b\n")
    monkeypatch.chdir("/")
    assert read(recipe.data.train, Path.cwd()).rows


@pytest.mark.parametrize(
    "text",
    [
        "reviews.csv", "data/reviews.csv", "rows.jsonl.gz", "./acme/support", "../x/y", "C:\\data\\rows.csv",
        "C:/data/rows", "data\\rows.jsonl", "acme/rows.JSONL", "my data/rows", "a/b/c/d", "data/*.jsonl",
        "data/**/*.csv", "acme/train.parquet", "rows?.csv", "support/", "book.xlsx",
    ],
)  # fmt: skip
def test_what_can_only_be_a_path_is_made_absolute(tmp_path: Path, text: str) -> None:
    recipe = loaded(tmp_path, train=text)
    assert Path(recipe.data.train).is_absolute()
    assert recipe.data.train.endswith(text.strip("./").split("/")[-1])


def test_what_is_there_is_a_path_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m-v1.5", "acme/support-v1.5", "Qwen/Qwen3-0.6B", "imdb", "rows", "sets/one"):
        (tmp_path / name).mkdir(parents=True)
    recipe = loaded(tmp_path, model="m-v1.5", train="acme/support-v1.5", start="sets/one")
    assert recipe.model.path == str(tmp_path / "m-v1.5")
    assert recipe.data.train == str(tmp_path / "acme" / "support-v1.5")
    assert recipe.lora.start_from == str(tmp_path / "sets" / "one")
    assert loaded(tmp_path, model="Qwen/Qwen3-0.6B").model.path == str(tmp_path / "Qwen/Qwen3-0.6B")
    assert loaded(tmp_path, train="imdb").data.train == str(tmp_path / "imdb")
    assert loaded(tmp_path, train="rows:test").data.train == str(tmp_path / "rows:test")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    overrides = ("model.path=Qwen/Qwen3-0.6B", "data.train=imdb", "data.test=x.csv")
    recipe = loaded(tmp_path, overrides)  # what the command line gives begins at the current folder
    assert (recipe.model.path, recipe.data.train) == ("Qwen/Qwen3-0.6B", "imdb")
    assert recipe.data.test == str(other / "x.csv")


def test_a_hub_id_is_no_folder_of_the_place_where_one_happens_to_stand(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.read import read

    for name in ("here/Qwen/Qwen3-0.6B", "here/imdb"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here/Qwen/Qwen3-0.6B/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    recipe = loaded(tmp_path, model="Qwen/Qwen3-0.6B", train="imdb")
    folder = put(hub, "Qwen/Qwen3-0.6B")
    assert model_folder(recipe.model) == folder
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: [{"text": "hub"}]))
    assert read(recipe.data.train, None).rows[0].fields == {"text": "hub"}


def test_an_adapter_to_start_from_is_always_a_folder(tmp_path: Path) -> None:
    assert loaded(tmp_path, start="runs/first-v1.5/adapter").lora.start_from == str(
        tmp_path / "runs/first-v1.5/adapter"
    )


def test_a_link_keeps_the_name_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"text": "a"}\n')
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blob")  # as in the hub's cache
    assert loaded(tmp_path, train="rows.jsonl").data.train == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("there", "misspelt"),
    [
        ("reviews.csv", "reviws.csv"),
        ("reviews.csv", "reviews.cvs"),
        ("data/reviews.csv", "data/reviews"),
        ("data/my-v1.5/train.jsonl", "data/my-v1.6"),
        ("rows/train.jsonl", "rosw"),
        ("reviews.jsonl", "review.jsonll"),
    ],
)
def test_a_misspelt_file_is_not_looked_for_on_the_hub(tmp_path: Path, there: str, misspelt: str) -> None:
    from finetune.data.read import read

    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="no such file; did you mean") as caught:
        read(loaded(tmp_path, train=misspelt).data.train, Path("/"))
    assert "hub data set:" not in str(caught.value)


def test_a_misspelt_model_folder_is_told_beside_what_the_hub_says(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine-v1.5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"did you mean mine-v1\.5"):
        model_folder(loaded(tmp_path, model="models/mien-v1.5").model)
    with pytest.raises(RecipeError, match=r"did you mean models\?"):
        model_folder(loaded(tmp_path, model="modles").model)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "write the hub id: Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "write the hub id: Qwen/Qwen3-0.6B"),
        ("hf://Qwen/Qwen3-0.6B", "write the hub id: Qwen/Qwen3-0.6B"),
        ("s3://bucket/model", "download the model"),
    ],
)
def test_an_address_is_told_from_a_folder(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        model_folder(loaded(tmp_path, model=address).model)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(RecipeError, match="is a file; give the folder"):
        model_folder(Model(path=str(tmp_path / "m.gguf")))
