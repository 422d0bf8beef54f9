"""A file or folder that a recipe names and that is not there: exit 3, with the key and the name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from finetune.data.prepare import prepare
from finetune.data.problems import faults
from finetune.errors import DataError, ExitCode
from finetune.events import result_of
from finetune.recipe.load import load_recipe
from finetune.recipe.names import DATA_KEYS, ON_DISK
from finetune.recipe.schema import Recipe
from finetune.training.job import set_up
from finetune.training.suite_prompts import ready_with_suite

KEYS = [".".join(key) for key in (*DATA_KEYS, *ON_DISK)]
NO_INPUTS = {  # keys with a text that names nothing to read; a model folder has its own message and exit code
    "model.path", "model.revision", "data.encoding", "prompt.template", "prompt.system", "prompt.completion", "output",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"text": "a film {i}", "label": "{("bad", "good")[i % 2]}"}}\n' for i in range(12))
    Path("rows.jsonl").write_text(rows)
    Path("recipe.yaml").write_text(
        "model: {path: builtin:reviews-base}\ndata: {train: rows.jsonl}\nprompt: {template: plain}\n"
    )
    return Path("recipe.yaml")


def texts(section: type[BaseModel], before: str = "") -> list[str]:
    """The dotted keys that take any text."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys += [key for one in inner for key in texts(one, f"{before}{name}.")]
        keys += [f"{before}{name}"] * (field.annotation in (str, str | None))
    return keys


def test_every_key_that_names_something_to_read_is_among_them() -> None:
    assert {*texts(Recipe)} == {*KEYS, *NO_INPUTS}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["none.jsonl", "./no/such/folder", "~/none.jsonl"])
def test_what_is_not_there_is_refused_before_a_model_is_loaded(recipe: Path, key: str, name: str) -> None:
    with pytest.raises(DataError) as caught:
        result_of(ready_with_suite(load_recipe(recipe, [f"{key}={name}"]), None))
    assert caught.value.exit_code == ExitCode.DATA
    said = str(caught.value)
    assert said.startswith(f"{key}: ") and Path(name).name in said, said


@pytest.mark.parametrize("key", ["data.train", "data.valid", "data.test"])
@pytest.mark.parametrize(
    "name", ["rows.jsnl", "*.csv", "builtin:none.jsonl", "https://a.org/rows.jsonl", ".:tset", "a"]
)
def test_names_that_lead_nowhere(recipe: Path, key: str, name: str) -> None:
    Path("a").mkdir()
    with pytest.raises(DataError, match=f"^{key}: "):
        result_of(ready_with_suite(load_recipe(recipe, [f"{key}={name}"]), None))


@pytest.mark.parametrize("key", ["data.valid", "data.test"])
def test_check_tells_it_as_a_fault(recipe: Path, key: str) -> None:
    read = load_recipe(recipe, [f"{key}=none.jsonl"])
    prepared = result_of(prepare(read, set_up(read).tokenizer, base=None))
    assert [where for where, _ in faults(prepared, read)] == [f"{key}: {Path('none.jsonl').absolute()}"]


def test_a_line_of_a_file_is_named_without_a_key(recipe: Path) -> None:
    Path("other.csv").write_text('text,label\n"a film,bad\n')
    with pytest.raises(DataError) as caught:
        result_of(ready_with_suite(load_recipe(recipe, ["data.test=other.csv"]), None))
    assert str(caught.value).startswith(f"{Path('other.csv').absolute()}:")


def test_an_adapter_folder_nearly_so_called_is_named(recipe: Path) -> None:
    Path("adapter").mkdir()
    with pytest.raises(DataError, match="did you mean adapter"):
        set_up(load_recipe(recipe, ["lora.start_from=adaptr"]))
    with pytest.raises(DataError, match=r"has no adapter_config\.json"):
        set_up(load_recipe(recipe, ["lora.start_from=adapter"]))
    Path("adapter", "adapter_config.json").write_text("{")
    set_up(load_recipe(recipe, ["lora.start_from=adapter"]))  # its content is judged where it is read
