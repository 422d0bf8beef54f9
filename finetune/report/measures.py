"""Measures shown in tables and pages, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.recipe.schema import PREFERENCE, measure_name


class Measure(NamedTuple):
    """One row of a table that compares two models."""

    key: str  # of Evaluation.summary; with a dot where a part of it has parts
    name: str
    more_is_better: bool


_OF_ROWS = (
    Measure("macro_f1", "macro F1", True),
    Measure("loss", "loss, nats/token", False),
    Measure("perplexity", "perplexity", False),
    Measure("token_accuracy", "token accuracy", True),
)
_OF_PAIRS = (
    Measure("accuracy", PREFERENCE, True),
    Measure("loss", "loss, nats/pair", False),
    Measure("pairs.margin", "margin", True),
    Measure("pairs.rewarded", "margin above 0, share", True),
    Measure("pairs.longer", "prefers the longer answer, share", False),
)


def measures_of(tuned: Mapping[str, Any]) -> tuple[Measure, ...]:
    """tuned: of `Evaluation.summary`, as report.json holds it."""
    if tuned.get("pairs"):
        return _OF_PAIRS
    right = measure_name(tuned.get("labels"), None, tuned.get("compared", "all"))
    return (Measure("accuracy", right, True), *_OF_ROWS)


def value_of(summary: Mapping[str, Any], key: str) -> float | None:
    """None where a model has no such measure, or there is no such model."""
    part, _, rest = key.rpartition(".")
    value: float | None = (summary.get(part) or {} if part else summary).get(rest)
    return value
