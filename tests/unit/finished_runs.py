"""Finished runs without a model: rows with answers, their figures as evaluation computes them, and a report of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import confusion_matrix, macro_f1, wilson_interval
from finetune.evaluation.verdict import overfitting_verdict
from finetune.events import Event, Finished, StepDone, Validated
from finetune.recipe.load import check_recipe
from finetune.report.finished_run import (  # its parts, as check.json gives them
    Checked,
    ComparisonFigures,
    Environment,
    FinishedRun,
    ReportFigures,
    _Balance,
    _Enough,
    _Pairs,
    _Split,
)
from finetune.report.finished_suite import SuiteFigures
from finetune.report.report import compare
from finetune.report.run_facts import Facts

LABELS = ("good", "bad")


def evaluation(
    expected: Sequence[str | None],
    predicted: Sequence[str | None],
    labels: Sequence[str] = LABELS,
    prompts: Sequence[str] | None = None,
    losses: Sequence[float] | None = None,
) -> Evaluation:
    """labels: none for open answers; predicted None: only the loss is measured."""
    prompts = prompts or [f"question {i}" for i in range(len(expected))]
    losses = losses or [0.5 if e == p else 1.5 for e, p in zip(expected, predicted, strict=True)]
    rows = tuple(
        RowResult(f"rows.jsonl:{i + 1}", prompts[i], e, p, None if p is None else e == p, losses[i], 2)
        for i, (e, p) in enumerate(zip(expected, predicted, strict=True))
    )
    judged = [row for row in rows if row.correct is not None]
    right = sum(bool(row.correct) for row in judged)
    loss = sum(row.loss for row in rows) / len(rows)
    found = Evaluation(
        rows=len(rows),
        tokens=2 * len(rows),
        loss=loss,
        perplexity=math.exp(loss),
        token_accuracy=0.5,
        accuracy=right / len(judged) if judged else None,
        interval=wilson_interval(right, len(judged)) if judged else None,
        macro_f1=None,
        labels=tuple(labels),
        confusion=None,
        results=rows,
    )
    if not labels or not judged:
        return found
    truth, chosen = found.label_numbers()
    matrix = confusion_matrix(truth, chosen, len(labels))
    score = macro_f1(matrix)
    around = (max(score - 0.05, 0.0), min(score + 0.05, 1.0))  # the bootstrap would take long
    return replace(found, confusion=matrix.tolist(), macro_f1=score, macro_f1_interval=around)


def answers(right: Sequence[bool], labels: Sequence[str] = LABELS) -> Evaluation:
    """Two labels by turns; where it is not right, the other one was predicted."""
    expected = [labels[i % 2] for i in range(len(right))]
    predicted = [labels[i % 2] if one else labels[1 - i % 2] for i, one in enumerate(right)]
    return evaluation(expected, predicted, labels)


def events(steps: int = 40) -> list[Event]:
    figures: list[Event] = [Validated(0, 0.0, None, 2.5, 12.0, 0.1, 0.5, True, 0.1)]
    for i in range(1, steps + 1):
        figures.append(StepDone(i, i / 20, 2.5 / i + 0.1, 1.0, 1e-3, 8, 40, 0.02, 1_000_000 + i))
        if i % 20 == 0:
            figures.append(Validated(i, i / 20, 2.5 / i + 0.1, 2.4 / i + 0.2, 1.3, 0.9, 0.8, True, 0.1))
    return [*figures, Finished(steps, steps, 0.26)]


def finished(
    tuned: Evaluation,
    base: Evaluation | None = None,
    name: str = "run",
    analysis: Analysis | None = None,
    identity: Mapping[str, Any] | None = None,
    suite: SuiteFigures | None = None,
    **sections: Any,
) -> FinishedRun:
    """A run of this recipe with these figures."""
    values = {"model": {"path": "maker/model"}, "data": {"train": "train.jsonl", "test": "rows.jsonl"}} | sections
    curve = events()
    validations = [event for event in curve if isinstance(event, Validated)]
    comparison = compare(base, tuned) if base else None
    figures = ReportFigures(
        backend="torch",
        device="cpu",
        scheme="float32",
        held_out=f"{tuned.rows} test rows",
        comparison=comparison
        and ComparisonFigures(
            comparison.verdict, len(comparison.fixed), len(comparison.broken), comparison.p_value, None
        ),
        overfitting=overfitting_verdict(validations),
        divergence=None,
        best_step=40,
        facts=Facts("maker/model", {"train": "train.jsonl"}, {"train": 64, "test": tuned.rows}, 40, 0.8, 2000.0, 10**6),
    )
    checked = Checked(
        splits={"train": _Split(64, 64), "test": _Split(tuned.rows, tuned.rows)},
        duplicates=_Pairs(),
        enough=_Enough("little", [f'rarest label "{LABELS[0]}" has 32 rows']),
        personal={},
        balance=_Balance({"train": dict.fromkeys(tuned.labels, 32)}),
    )
    return FinishedRun(
        path=Path(name),
        recipe=check_recipe(values),
        figures=figures,
        base=base,
        tuned=tuned,
        events=curve,
        environment=Environment("3.12", "Linux", "x86_64", {"numpy": "2"}, ["shared prefixes"], True),
        checked=checked,
        analysis=analysis,
        suite=suite,
        identity=identity or {"rows": {"train": "a", "test": "b"}, "base_model": {"files": {}}},
    )
