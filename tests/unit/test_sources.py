"""Where a recipe's model stands: shipped, a folder, or a hub id; and what is said where it is nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import EnvironmentProblem, FinetuneError, RecipeError
from finetune.recipe.locate import builtin, demo_recipe, model_folder
from finetune.recipe.schema import Model


def refused(path: str, kind: type[FinetuneError] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        model_folder(Model(path=path))
    return str(caught.value)


def test_the_demo_and_its_model_are_at_hand() -> None:
    assert demo_recipe().is_file()
    assert model_folder(Model(path="builtin:reviews-base")) == builtin("builtin:reviews-base")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(Model(path=str(tmp_path))) == tmp_path


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    assert "has no config.json" in refused(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_what_can_be_no_hub_id_is_a_missing_folder(path: str) -> None:
    assert f"no folder {path}" in refused(path)


@pytest.mark.parametrize(
    "path", ["builtin:nothing", "builtin:../commands", "builtin:../../backends", "builtin:", "builtin:reviews"]
)
def test_only_what_is_shipped_is_built_in(path: str) -> None:
    message = refused(path)
    assert "not shipped" in message
    assert message.endswith("there are builtin:reviews-base")


def test_a_hub_id_without_a_hub_is_a_problem_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("the hub cannot be reached\nmore of it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused("someone/something", EnvironmentProblem)
    assert "the hub cannot be reached" in message
    assert "more of it" not in message
