"""Summaries of the runs in a folder, from their files: state, model, data, gain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.disk.lock import is_locked
from finetune.disk.manifest import newest_first
from finetune.disk.run_files import read_json, read_regular
from finetune.disk.run_folder import RunFolder
from finetune.errors import FinetuneError, Incompatible
from finetune.recipe.load import MAX_BYTES
from finetune.recipe.schema import AnswerPart, measure_name

BEST = "best"  # the winner's run, in the folder of a search
_STAMP = re.compile(r"-(\d{8}-\d{6})(?:-\d+)?$")  # of a run's name, as `create` writes it
_SECTION = re.compile(r"^(?:model|data):.*\n?(?:^(?:[ \t#].*)?\n?)*", re.MULTILINE)  # a whole recipe takes long to read


@dataclass(frozen=True)
class _Figures:
    """What is read of one model in report.json."""

    loss: float
    accuracy: float | None
    labels: list[str]
    compared: AnswerPart = "all"  # of open answers; runs of 0.1.0 do not say
    pairs: dict[str, float | None] | None = None


@dataclass(frozen=True)
class _Comparison:
    verdict: str


@dataclass(frozen=True)
class _Report:
    base: _Figures | None
    tuned: _Figures
    comparison: _Comparison | None


@dataclass(frozen=True)
class RunLine:
    """One run, in words."""

    path: Path
    began: datetime
    state: str  # finished, stopped at step 12, running, or damaged and why
    model: str = "?"
    data: str = "?"
    figure: str = ""  # accuracy 50.0% -> 84.5%
    verdict: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{BEST}" if self.path.name == BEST else self.path.name


def overview(folder: Path) -> list[RunLine]:
    """Every run in the folder, those of searches too, or the folder itself where it is one; the newest first."""
    inside = [path for one in folder.iterdir() for path in (one, one / BEST)]
    paths = [folder] if _is_run(folder) else [path for path in inside if _is_run(path)]
    return sorted(map(_line, paths), key=lambda line: (line.began, line.path.name), reverse=True)


def _is_run(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir() and any((path / name).exists() for name in ("recipe.yaml", "identity.json"))
    return False


def _line(path: Path) -> RunLine:
    run, began = RunFolder(path), _began(path)
    recipe: Mapping[str, Any] = {}
    try:
        recipe = _recipe(run)
        report = read_json(run.report, _Report, "start a new run", "ignore")
        state = "finished" if report else _state(run)
    except (FinetuneError, OSError) as error:
        return RunLine(path, began, f"damaged: {str(error).removeprefix(f'{path}/')}", **_named(recipe))
    if report is None:
        return RunLine(path, began, state, **_named(recipe))
    verdict = report.comparison.verdict.partition(":")[0] if report.comparison else ""
    return RunLine(path, began, state, **_named(recipe), figure=_figure(report), verdict=verdict)


def _began(path: Path) -> datetime:
    """As its name says, or the time of its files where that was changed."""
    if stamp := _STAMP.search(path.name):
        with suppress(ValueError):
            return datetime.strptime(stamp[1], "%Y%m%d-%H%M%S")
    try:
        return datetime.fromtimestamp(path.stat().st_mtime)
    except (OSError, ValueError, OverflowError):
        return datetime.min


def _recipe(run: RunFolder) -> Mapping[str, Any]:
    """The sections model and data. Raises Incompatible, DiskError."""
    text = read_regular(run.recipe)
    if text is None:
        raise Incompatible(f"{run.recipe}: missing")
    try:
        sections = "".join(_SECTION.findall(text[:MAX_BYTES].decode()))
        values = YAML(typ="safe", pure=True).load(sections)
    except (UnicodeDecodeError, YAMLError, ValueError, TypeError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Incompatible(f"{run.recipe}: not a recipe that can be read")
    return values


def _named(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The last part of the model's path and of the training data's, a hub id whole."""
    found = {}
    for key, section, name in (("model", "model", "path"), ("data", "data", "train")):
        value = recipe.get(section)
        text = str(value.get(name, "?")) if isinstance(value, dict) else "?"
        found[key] = Path(text).name if Path(text).is_absolute() else text
    return found


def _state(run: RunFolder) -> str:
    if is_locked(run.path):
        return "running"
    steps = [step for step, _ in newest_first(run.checkpoints)] if run.checkpoints.is_dir() else []
    return f"stopped at step {steps[0]}" if steps else "stopped before step 1"


def _figure(report: _Report) -> str:
    """Base -> tuned: of accuracy or of right answers where there is one that is not 0, else of the loss."""
    base, tuned = report.base, report.tuned
    if tuned.accuracy is None or (not tuned.labels and not tuned.accuracy and not (base and base.accuracy)):
        before = "" if base is None else f"{base.loss:.4f} -> "
        return f"loss {before}{tuned.loss:.4f}"
    measure = measure_name(tuned.labels, tuned.pairs, tuned.compared)
    before = "" if base is None or base.accuracy is None else f"{base.accuracy:.1%} -> "
    return f"{measure} {before}{tuned.accuracy:.1%}"
