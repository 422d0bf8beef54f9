"""Locates a recipe's model: built in, a folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from backends.model_folder import files_to_download
from finetune.connections import to_hub
from finetune.errors import EnvironmentProblem, RecipeError
from finetune.recipe.names import BUILTIN, hub_id_in, is_address, is_model_id, near
from finetune.recipe.schema import Model

ASSETS = Path(__file__).parents[1] / "assets"
_BESIDE = ["*.json", "*.jinja", "*.model", "*.txt"]  # what a model's folder has beside its weights


def builtin(name: str) -> Path:
    """`builtin:reviews-base` -> the model folder shipped inside the package."""
    path = ASSETS / name.removeprefix(BUILTIN)
    if path.resolve().parent != ASSETS.resolve() or not (path / "config.json").exists():
        known = ", ".join(sorted(f"builtin:{one.parent.name}" for one in ASSETS.glob("*/config.json")))
        raise RecipeError(f"{name}: not shipped with finetune; there are {known}")
    return path


def demo_recipe() -> Path:
    """configs/demo.yaml, from the installed package or from the repository."""
    installed = Path(__file__).parents[1] / "configs" / "demo.yaml"
    return installed if installed.exists() else Path(__file__).parents[2] / "configs" / "demo.yaml"


def model_folder(model: Model, before_weights: Callable[[Path], None] = lambda _: None) -> Path:
    """The model's folder on this machine, downloaded first if it is a hub id.

    before_weights: called with the folder before the weights are downloaded into it; may raise.
    Raises RecipeError for a folder that is not there, EnvironmentProblem where the hub cannot be reached.
    """
    if model.path.startswith(BUILTIN):
        return builtin(model.path)
    if is_address(model.path):
        name = hub_id_in(model.path)
        remedy = f"write the hub id: {name}" if name else "download the model, and give its folder"
        raise RecipeError(f"model.path: {model.path} is an address; {remedy}")
    folder = Path(model.path).expanduser()
    if folder.is_absolute() and folder.is_dir():  # a recipe's paths are; a hub id is no folder that stands here too
        if not (folder / "config.json").exists():
            raise RecipeError(
                f"model.path: {folder} has no config.json; give a model folder, or a hub id such as org/name"
            )
        return folder
    if folder.is_absolute() and folder.is_file():
        raise RecipeError(f"model.path: {folder} is a file; give the folder of the model, or a hub id such as org/name")
    if not is_model_id(model.path):
        raise RecipeError(
            f"model.path: no folder {model.path}; {_did_you_mean(folder)}give a model folder, or a hub id such as "
            "org/name"
        )
    return _from_hub(model, before_weights)


def _did_you_mean(folder: Path) -> str:
    close = near(folder)
    return f"did you mean {close}? Or " if close else ""


def _from_hub(model: Model, before_weights: Callable[[Path], None]) -> Path:
    """First all but the weights, then those that the model is made of: makers add copies in other formats."""
    if model.remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        raise RecipeError("model.remote_code: needs model.revision, the full commit that you have looked at")
    folder = _downloaded(model.path, model.revision, [*_BESIDE, "*.py"] if model.remote_code else _BESIDE)
    weights = files_to_download(folder)
    if not all((folder / name).is_file() for name in weights):
        before_weights(folder)
        _downloaded(model.path, folder.name, weights)  # of the same commit, which the folder is named after
    return folder


def _downloaded(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with to_hub():
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentProblem(
            f"model.path: {name} is no folder here and the hub did not give it ({first}); "
            f"{_did_you_mean(Path(name))}check the name, the connection "
            "and HF_TOKEN for gated models, or give the path of a downloaded folder"
        ) from None
