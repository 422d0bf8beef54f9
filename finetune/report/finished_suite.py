"""A finished run's suite results, read from report.json and suite.json."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class PassedCases:
    """Cases that a model passes, and the 95 % interval of their share."""

    passed: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class CaseAnswer:
    answer: str
    failures: list[str]  # none: it passes


@dataclass(frozen=True)
class CaseFigures:
    location: Annotated[str, Field(validation_alias="place")]
    name: str
    tuned: CaseAnswer
    base: CaseAnswer | None = None


@dataclass(frozen=True)
class SuiteFigures:
    """As `SuiteResult`, of report.json and suite.json."""

    file: str
    cases: int
    tuned: PassedCases
    base: PassedCases | None = None
    fixed: int | None = None  # None without a base, and in runs of before
    broken: int | None = None
    p_value: float | None = None
    results: list[CaseFigures] = field(default_factory=list)  # none where only the figures are known


def with_cases(figures: SuiteFigures | None, asked_last: SuiteFigures | None) -> SuiteFigures | None:
    """The run's own suite with its cases, unless `finetune eval --suite` has asked another one since."""
    if figures is None or asked_last is None or replace(asked_last, results=[]) != figures:
        return figures
    return asked_last
