"""Paths that no system takes, or that lead nowhere: exit 2 or 6, one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune.disk.atomic import write_file
from finetune.disk.run_folder import create
from finetune.errors import DiskError, FinetuneError, RecipeError
from finetune.recipe.load import load_recipe

TEXT = "model: {path: builtin:reviews-base}\ndata: {train: builtin:reviews/train.jsonl}\n"
OUTPUTS = {
    "a name too long": ("n" * 300, 6),
    "a name of many bytes": ("🦊" * 80, 6),
    "a path too long": ("/".join(["d" * 200] * 30), 6),
    "below /proc": ("/proc/x", 6),
    "below a device": ("/dev/null/x", 6),
    "below a file": ("recipe.yaml", 6),
    "NUL": ("runs\0", 2),
    "NUL amid": ("ru\0ns/x", 2),
    "half a character": ("runs\ud83e", 2),
    "the other half": ("\udd8a", 2),
    "bytes of another encoding": ("runs\udce9", 2),
    "nobody's home": ("~nobody-of-that-name/x", 2),
    "no home": ("~no such user", 2),
}


@pytest.mark.skipif(os.name != "posix", reason="paths as POSIX has them")
@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("how", ["in the recipe", "on the command line"])
def test_an_output_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    output, code = OUTPUTS[what]
    written = json.dumps(output)
    Path("recipe.yaml").write_text(TEXT + (f"output: {written}\n" if how == "in the recipe" else ""))
    if what == "below /proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc")
    with pytest.raises(FinetuneError) as caught:
        create(load_recipe(Path("recipe.yaml"), [] if how == "in the recipe" else [f"output={written}"]), "recipe")
    assert caught.value.exit_code == code, caught.value
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable(), "it can be shown"


def test_a_home_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    (tmp_path / "recipe.yaml").write_text(f"{TEXT}output: ~/runs\n")
    with pytest.raises(RecipeError, match="there is no folder"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "gone").mkdir()
    assert create(load_recipe(tmp_path / "recipe.yaml"), "recipe").path.parent == tmp_path / "gone" / "runs"


def test_a_run_in_a_folder_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer could not be written, which would be told after training."""
    (tmp_path / "recipe.yaml").write_text(TEXT)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "d\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "d\udce9")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        create(recipe, "recipe")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 240, "🦊" * 60, "n" * 255])
def test_a_recipe_with_a_name_too_long_for_its_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{TEXT}output: {tmp_path / 'runs'}\n")
    with pytest.raises(DiskError, match="too long"):
        create(load_recipe(tmp_path / "recipe.yaml"), name)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.valid", "data.test", "lora.start_from"])
@pytest.mark.parametrize("value", ["a\0b.jsonl", "a\ud83e.jsonl", "~nobody-of-that-name/a.jsonl"])
def test_other_paths_of_a_recipe(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    with pytest.raises(RecipeError, match=key):
        load_recipe(tmp_path / "recipe.yaml", [f"{key}={json.dumps(value)}"])


def test_characters_that_json_escapes_in_halves_are_whole(tmp_path: Path) -> None:
    name = "ünïcødé-日本-🦊"
    (tmp_path / "recipe.yaml").write_text(f"{TEXT}output: {json.dumps(str(tmp_path / name))}\n")
    run = create(load_recipe(tmp_path / "recipe.yaml"), "recipe")
    assert run.path.parent == tmp_path / name
    assert load_recipe(run.recipe).output == str(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="/dev/null")
@pytest.mark.parametrize("path", ["n" * 300, "/proc/x/y", "/dev/null/x"])
def test_a_file_that_cannot_be_written(path: str) -> None:
    with pytest.raises(DiskError):
        write_file(Path(path), "x")
