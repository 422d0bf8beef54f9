"""A finished run's suite, read back: figures as report.json has them, single cases as suite.json has them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class ToldPassed:
    """Cases that a model passes, and the 95 % interval of their share."""

    passed: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class ToldAnswer:
    answer: str
    failures: list[str]  # none: it passes


@dataclass(frozen=True)
class ToldCase:
    location: Annotated[str, Field(validation_alias="place")]
    name: str
    tuned: ToldAnswer
    base: ToldAnswer | None = None


@dataclass(frozen=True)
class ToldSuite:
    """As `SuiteResult`, of report.json and suite.json."""

    file: str
    cases: int
    tuned: ToldPassed
    base: ToldPassed | None = None
    fixed: int | None = None  # None without a base, and in runs of before
    broken: int | None = None
    p_value: float | None = None
    results: list[ToldCase] = field(default_factory=list)  # none where only the figures are known


def with_cases(told: ToldSuite | None, asked_last: ToldSuite | None) -> ToldSuite | None:
    """The run's own suite with its cases, unless `finetune eval --suite` has asked another one since."""
    if told is None or asked_last is None or replace(asked_last, results=[]) != told:
        return told
    return asked_last
