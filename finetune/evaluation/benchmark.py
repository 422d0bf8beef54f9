"""lm-eval results of two models, with intervals and paired change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.evaluation.intervals import holm, mcnemar_exact, weighted_mean_interval, wilson_interval

Interval = tuple[float, float]
Values = Mapping[tuple[str, int], float]  # (task, row of it) -> what a metric says of the row
TOGETHER = "all"  # the filter that most tasks have, which is not told


@dataclass(frozen=True)
class Share:
    """One model's figure: of right answers, or a mean where a row is not just right or wrong."""

    value: float
    interval: Interval  # 95 %


@dataclass(frozen=True)
class Figure:
    """One metric of one task, or of a group's tasks together, for both models on the same rows."""

    task: str
    metric: str
    rows: int
    base: Share
    tuned: Share
    change: Interval  # 95 %, of tuned - base
    fixed: int | None  # rows that are right or wrong: wrong before, right now; None where the metric is a mean
    broken: int | None
    p_value: float | None  # McNemar's exact test
    corrected: float | None = None  # the same, for the number of figures that were asked for (Holm)


def figures(requested: Sequence[str], base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Figure]:
    """Of each task that was asked for, and of each task of a group, all metrics that have a number for every row.

    base, tuned: what lm-eval's simple_evaluate returns, with its samples.
    """
    before, after = _by_metric(base["samples"]), _by_metric(tuned["samples"])
    subtasks: Mapping[str, Sequence[str]] = base.get("group_subtasks") or {}
    compared = []
    for name in dict.fromkeys([*requested, *sorted(base["samples"])]):
        leaves = _leaves(name, subtasks)
        for metric, values in before.items():
            rows = {row: value for row, value in values.items() if row[0] in leaves}
            if rows:
                compared.append(_figure(name, metric, rows, after[metric]))
    asked = [i for i, figure in enumerate(compared) if figure.task in requested and figure.p_value is not None]
    for i, p_value in zip(asked, holm([compared[i].p_value or 0.0 for i in asked]), strict=True):
        compared[i] = replace(compared[i], corrected=p_value)
    return compared


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group, and of the groups in it; a task alone is its own."""
    inner = subtasks.get(name) or ()
    return {leaf for one in inner if one != name for leaf in _leaves(one, subtasks)} or {name}


def _by_metric(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[tuple[str, int], float]]:
    found: dict[str, dict[tuple[str, int], float]] = {}
    for task, rows in samples.items():
        for row in rows:
            for metric in row["metrics"]:
                if isinstance(row[metric], bool | int | float):  # perplexities and the like are of no single row
                    name = metric if row["filter"] in ("none", TOGETHER) else f"{metric} ({row['filter']})"
                    found.setdefault(name, {})[task, row["doc_id"]] = float(row[metric])
    return found


def _figure(task: str, metric: str, before: Values, after: Values) -> Figure:
    pairs = [(value, after[row]) for row, value in before.items()]
    differences = [new - old for old, new in pairs]
    judged = all(value in (0.0, 1.0) for pair in pairs for value in pair)
    fixed, broken = pairs.count((0.0, 1.0)), pairs.count((1.0, 0.0))
    return Figure(
        task,
        metric,
        len(pairs),
        _share([old for old, _ in pairs], judged),
        _share([new for _, new in pairs], judged),
        weighted_mean_interval(differences, [1.0] * len(pairs)),
        fixed if judged else None,
        broken if judged else None,
        mcnemar_exact(fixed, broken) if judged else None,
    )


def _share(values: Sequence[float], judged: bool) -> Share:
    mean = sum(values) / len(values)
    if judged:
        return Share(mean, wilson_interval(round(sum(values)), len(values)))
    return Share(mean, weighted_mean_interval(values, [1.0] * len(values)))
