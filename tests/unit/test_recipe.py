"""The recipe: strict, with the line of every mistake, and read back as it was written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from ruamel.yaml import YAML

from finetune.errors import RecipeError
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LEAST = "model:\n  path: builtin:reviews-base\ndata:\n  train: builtin:reviews/train.jsonl\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the recipe."""
    found = []
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)  # a section may be left out
        section = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if section is not None:
            found += keys(section, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def refused(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_fits_the_schema(config: Path) -> None:
    load_recipe(config)
    jsonschema.validate(YAML(typ="safe", pure=True).load(config.read_text()), Recipe.model_json_schema())


def test_there_are_recipes_for_every_promised_machine() -> None:
    promised = {"demo", "classification", "instruction", "chat", "macbook-8gb", "macbook-16gb"}
    assert promised | {"nvidia-8gb", "nvidia-12gb", "nvidia-24gb"} <= {config.stem for config in CONFIGS}


def test_the_resolved_recipe_reads_back_unchanged(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, LEAST + "train:\n  learning_rate: 1e-5\n  clip_norm: null\nlora: {dropout: 0.25}\n")
    )
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.clip_norm is None


def test_no_and_yes_are_words(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, LEAST + "  labels: [no, yes]\n")).data.labels == ["no", "yes"]


@pytest.mark.parametrize("key", [key for key in keys(Recipe) if key != "data.columns"])
def test_a_misspelt_key_is_named_with_its_line_and_the_right_one(tmp_path: Path, key: str) -> None:
    *sections, name = key.split(".")
    wrong = name[:-1] + "_" + name[-1] + "x"
    message = refused(tmp_path, LEAST, (f"{'.'.join([*sections, wrong])}=1",))
    assert f"unknown key {'.'.join([*sections, wrong])}" in message
    assert f"did you mean {name}?" in message


@pytest.mark.parametrize("key", keys(Recipe))
def test_a_value_of_the_wrong_type_is_refused_with_its_key(tmp_path: Path, key: str) -> None:
    assert key in refused(tmp_path, LEAST, (f"{key}=[{{a: 1}}]",))


@pytest.mark.parametrize("key", ["lora.rank", "train.epochs", "train.batch_size", "seed"])
@pytest.mark.parametrize("value", ["true", "'8'", "1.5", "-1"])
def test_integers_are_integers(tmp_path: Path, key: str, value: str) -> None:
    assert key in refused(tmp_path, LEAST, (f"{key}={value}",))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (LEAST + "lora:\n  rank: 4\n  rank: 8\n", 7, "rank stands twice"),
        (LEAST + "lora:\n  rnak: 4\n", 6, "did you mean rank?"),
        (LEAST + "train:\n  epochs: 1\n  steps: 1\n", 5, "exclude each other"),
        (LEAST + "lora:\n  dora: true\n  dropout: 0.1\n", 5, "set dropout to 0, or remove dora"),
        (LEAST + "train: [1, 2\n", 6, "not valid YAML"),
        ("data:\n  train: x\n", 1, "model is missing"),
        ("model: {}\ndata:\n  train: x\n", 1, "model.path is missing"),
        (LEAST + "  format: chat\ntask: classification\n", 1, "task classification needs rows"),
        ("- 1\n", 1, "mapping of sections"),
        (LEAST + "seed: !!python/object/apply:os.system ['true']\n", 5, "a tag (!!python"),
    ],
)
def test_mistakes_name_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    message = refused(tmp_path, text)
    assert f"recipe.yaml:{line}: " in message
    assert words in message


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, LEAST + "lora: {rank: x, alpha: y}\nsede: 1\n")
    assert len(message.splitlines()) == 3


def test_overrides_win_and_are_named_in_errors(tmp_path: Path) -> None:
    file = write(tmp_path, LEAST + "lora: {rank: 4}\n")
    recipe = load_recipe(file, ["lora.rank=16", "train.learning_rate=3e-4", "train.clip_norm="])
    assert (recipe.lora.rank, recipe.train.learning_rate, recipe.train.clip_norm) == (16, 3e-4, None)
    assert "command line (lora.rank=0)" in refused(tmp_path, LEAST, ("lora.rank=0",))
    assert "key=value" in refused(tmp_path, LEAST, ("lora.rank",))
    assert "has no keys of its own" in refused(tmp_path, LEAST, ("seed=1", "seed.x=1"))


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    file = write(tmp_path, LEAST.replace("builtin:reviews/train.jsonl", "rows.jsonl"))
    monkeypatch.chdir("/")
    assert load_recipe(file).data.train == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00", b""])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(file)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "replace"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(file)


def test_recipe_errors_and_help_come_before_any_framework(tmp_path: Path) -> None:
    heavy = ["torch", "mlx", "transformers", "datasets", "numpy", "scipy", "matplotlib"]
    file = write(tmp_path, LEAST + "lora: {rnak: 1}\n")
    for arguments, code in ((["--help"], 0), (["train", str(file), "--no-supervisor"], 2), (["schema"], 0)):
        script = (
            "import sys, json; from finetune.cli import main\n"
            f"sys.argv = ['finetune', *{arguments!r}]\n"
            "try: main()\n"
            "except SystemExit as end: code = end.code or 0\n"
            f"print(json.dumps([code, [m for m in {heavy!r} if m in sys.modules]]), file=sys.stderr)"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert json.loads(ended.stderr.splitlines()[-1]) == [code, []]
