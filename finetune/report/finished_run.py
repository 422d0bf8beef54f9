"""A finished run, read from its folder or taken at its end: the input of pages and comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from finetune.disk.adapter_check import Loading
from finetune.disk.exports import Made, exports_of
from finetune.disk.identity import read_identity
from finetune.disk.metrics import read
from finetune.disk.run_files import check_values, read_json
from finetune.disk.run_folder import RunFolder, open_existing
from finetune.errors import Incompatible
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.leaked import Figure
from finetune.evaluation.verdict import Overfitting
from finetune.events import Event, StepDone, Validated
from finetune.recipe.schema import Recipe
from finetune.report.finished_suite import SuiteFigures, with_cases
from finetune.report.report import Report, load_evaluation
from finetune.report.run_facts import Facts
from finetune.report.run_times import PredictedSeconds

_REMEDY = "delete it and resume the run, which writes it anew"


@dataclass(frozen=True)
class ComparisonFigures:
    """What report.json says of base against tuned."""

    verdict: str
    fixed: int
    broken: int
    p_value: float | None
    bag_of_words: float | None = None


@dataclass(frozen=True)
class FigurePair:
    base: Figure | None
    tuned: Figure


@dataclass(frozen=True)
class LeakFigures:
    """As `Leaked`, of report.json."""

    measure: str
    rows: int
    leaked: int
    all_rows: FigurePair
    others: FigurePair | None


@dataclass(frozen=True)
class PartSeconds:
    """Seconds of each part of a run."""

    predicted: PredictedSeconds
    measured: dict[str, float]


@dataclass(frozen=True)
class ReportFigures:
    """What is read again of report.json; runs of before lack some of it."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    backend: str
    device: str
    scheme: str
    held_out: str
    comparison: ComparisonFigures | None
    overfitting: Overfitting
    divergence: str | None
    best_step: int
    check: str = ""
    facts: Facts | None = None
    leaked: LeakFigures | None = None
    limited: list[str] = field(default_factory=list)
    loads: list[Loading] = field(default_factory=list)
    connections: int | None = None
    time: PartSeconds | None = None
    suite: SuiteFigures | None = None


@dataclass(frozen=True)
class _Pairs:
    exact: list[Any] = field(default_factory=list)
    near: list[Any] = field(default_factory=list)
    leaks: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Enough:
    level: str
    reasons: list[str]


@dataclass(frozen=True)
class _Personal:
    rows: int


@dataclass(frozen=True)
class _Balance:
    labels: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Split:
    rows: int
    used: int
    lost_tokens: int = 0


@dataclass(frozen=True)
class Checked:
    """What is read again of check.json."""

    splits: dict[str, _Split]
    duplicates: _Pairs
    enough: _Enough
    personal: dict[str, _Personal]
    balance: _Balance = field(default_factory=_Balance)
    faults: int = 0
    bad_rows: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Environment:
    """What is read again of environment.json."""

    python: str = "?"
    system: str = "?"
    processor: str = "?"
    libraries: dict[str, str] = field(default_factory=dict)
    shortcuts: list[str] = field(default_factory=list)
    repeatable: bool | None = None


@dataclass(frozen=True)
class FinishedRun:
    path: Path
    recipe: Recipe
    figures: ReportFigures
    base: Evaluation | None
    tuned: Evaluation
    events: Sequence[Event]
    environment: Environment
    checked: Checked | None  # None where the run has no check.json
    analysis: Analysis | None  # None where the run has no kinds.json
    identity: Mapping[str, Any]
    suite: SuiteFigures | None = None  # None where the recipe names none
    exports: Sequence[Made] = ()

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def steps(self) -> list[StepDone]:
        return [event for event in self.events if isinstance(event, StepDone)]

    @property
    def validations(self) -> list[Validated]:
        return [event for event in self.events if isinstance(event, Validated)]


def read_finished(path: Path) -> FinishedRun:
    """Raises Incompatible for what is not a run, a run that has not finished, or what no run writes; DiskError."""
    folder, recipe = open_existing(path)
    figures = read_json(folder.report, ReportFigures, _REMEDY, "ignore")
    if figures is None:
        raise Incompatible(f"{path}: this run has not finished; resume it with: finetune resume {path}")
    tuned = load_evaluation(folder.evaluation("tuned"))
    if tuned is None:
        raise Incompatible(f"{folder.evaluation('tuned')}: missing; measure the run again with: finetune eval {path}")
    base = load_evaluation(folder.evaluation("base"), [row.expected for row in tuned.results])
    if figures.comparison is None:
        base = None
    return _with_files(folder, recipe, figures, base, tuned, read(folder.metrics))


def at_the_end(folder: RunFolder, recipe: Recipe, report: Report, events: Iterable[Event]) -> FinishedRun:
    """The run whose report this is, before report.json marks it as finished."""
    figures = check_values(report.to_json(), ReportFigures, "report.json", _REMEDY, "ignore")
    return _with_files(folder, recipe, figures, report.base, report.tuned, list(events))


def _with_files(
    folder: RunFolder,
    recipe: Recipe,
    figures: ReportFigures,
    base: Evaluation | None,
    tuned: Evaluation,
    events: Sequence[Event],
) -> FinishedRun:
    remedy = "delete it: the page does without"
    return FinishedRun(
        path=folder.path,
        recipe=recipe,
        figures=figures,
        base=base,
        tuned=tuned,
        events=events,
        environment=read_json(folder.path / "environment.json", Environment, remedy, "ignore") or Environment(),
        checked=read_json(folder.path / "check.json", Checked, remedy, "ignore"),
        analysis=read_json(folder.path / "kinds.json", Analysis, remedy, "ignore"),
        identity=read_identity(folder.path) or {},
        suite=with_cases(figures.suite, read_json(folder.path / "suite.json", SuiteFigures, remedy, "ignore")),
        exports=exports_of(folder),
    )
