"""The layout of a run's folder."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from finetune.disk.atomic import disk_errors, make_folder, sync_directory, write_file
from finetune.disk.run_files import read_json
from finetune.errors import Incompatible, RecipeError
from finetune.recipe.load import dump_recipe, load_written
from finetune.recipe.schema import Recipe

ENVIRONMENT = "environment.json"
_LIBRARIES = ("numpy", "transformers", "safetensors", "tokenizers")  # beside the backend's own


@dataclass(frozen=True)
class Measured:
    """Which rows the figures are of, and the tokens by which each label is measured."""

    split: Literal["valid", "test"]
    label_tokens: list[list[int]]


@dataclass(frozen=True)
class Account:
    """What is read again of data.json; runs of 0.1.0 have only the labels."""

    labels: list[str]
    always: dict[str, str | None] | None = None
    held_out: Measured | None = None


@dataclass(frozen=True)
class _Surroundings:
    """What is read again of environment.json; earlier runs have not recorded it."""

    recomputed: bool | None = None


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, where it trained; then there is no adapter."""
        return self.path / "model"

    @property
    def trained(self) -> Path:
        """The adapter's folder or the model's."""
        return self.model if self.model.is_dir() else self.adapter

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def held_out(self) -> Path:
        return self.path / "held-out.jsonl"

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        self.write_json("identity.json", identity)

    def evaluation(self, which: str) -> Path:
        return self.path / f"evaluation-{which}.json"

    @property
    def words(self) -> Path:
        """How good the words alone are, which is measured once."""
        return self.path / "words.json"

    @property
    def head(self) -> Path:
        """The head that learned alone, where the recipe has one."""
        return self.path / "head.safetensors"

    @property
    def references(self) -> Path:
        """Log-probabilities of pairs of answers under the model without its adapter."""
        return self.path / "references.json"

    @property
    def race(self) -> Path:
        """The race that chose the learning rate, where the recipe leaves it open."""
        return self.path / "race.json"

    def always(self) -> dict[str, str | None] | None:
        """What every training row had beside its question (`data.beside.Always`); None where the run has recorded none.

        Raises Incompatible for what no run writes; DiskError.
        """
        account = self.account()
        return account.always if account else None

    def labels(self) -> tuple[str, ...] | None:
        """The labels that the run was trained on, in order; None where it has recorded nothing. Raises as `always`."""
        account = self.account()
        return tuple(account.labels) if account else None

    def account(self) -> Account | None:
        """None where the run has recorded nothing. Raises as `always`."""
        return read_json(self.path / "data.json", Account, "resume the run, which writes it anew", "ignore")

    def recomputed(self) -> bool | None:
        """Whether blocks are computed again in the backward pass; None where the run has not decided. Raises as
        `always`.
        """
        found = read_json(self.path / ENVIRONMENT, _Surroundings, "remove it; it is written anew", "ignore")
        return found.recomputed if found else None

    def write_json(self, name: str, values: Any) -> None:
        write_file(self.path / name, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")


def create(recipe: Recipe, name: str) -> RunFolder:
    """A new folder `output/name-date-time`; never one that exists. Raises DiskError."""
    output = Path(recipe.output).expanduser()  # `load_recipe` has seen that this can be a path
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError:
        raise RecipeError(f"output: {output.absolute()} is not UTF-8, and no tokenizer can be written there") from None
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    make_folder(output)
    for attempt in range(1000):
        path = output / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        with disk_errors(path):
            try:
                path.mkdir()
            except FileExistsError:
                continue
        folder = RunFolder(path)
        write_file(folder.recipe, dump_recipe(recipe))
        sync_directory(output)
        return folder
    raise RecipeError(f"output: no free name for a run in {output}")


def open_existing(path: Path) -> tuple[RunFolder, Recipe]:
    """A run's folder and its recipe. Raises Incompatible when it is not a run, or its recipe is cut off."""
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise Incompatible(
            f"{path}: not a run (no recipe.yaml in it); runs are the folders that `finetune train` makes"
        )
    return folder, load_written(folder.recipe)


def environment(backend: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine, for the record of a run: `described` as `registry.describe` gives it."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "backend": backend,
        "device": {key: value for key, value in described.items() if key != "versions"},
        "libraries": versions | described["versions"],
    }
