"""Figures without held-out rows that are also in the training rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import weighted_mean_interval, wilson_interval


@dataclass(frozen=True)
class Figure:
    """One model on some rows: the share right, or the loss where answers are not right or wrong."""

    value: float
    interval: tuple[float, float] | None  # 95 %; None for the loss of a single row


@dataclass(frozen=True)
class Leaked:
    """Both models on all held-out rows, and on those that do not stand in the training rows."""

    measure: str  # accuracy, exact match, ..., or loss
    rows: int
    leaked: int  # of those
    all_rows: tuple[Figure | None, Figure]  # (base, tuned); no base where the recipe asks for none
    others: tuple[Figure | None, Figure] | None  # of the rows that are not leaked; None where there are none

    @property
    def message(self) -> str:
        stand = "stands" if self.leaked == 1 else "stand"
        start = f"Leaked: {self.leaked:,} of these {self.rows:,} rows {stand} in the training rows too."
        if self.others is None:
            return f"{start} So the figures say nothing of rows that the model has not seen."
        return (
            f"{start} {self.measure.capitalize()} on all: {_pair(*self.all_rows)}; without them: {_pair(*self.others)}."
        )

    def to_json(self) -> dict[str, Any]:
        both = {"all_rows": self.all_rows, "others": self.others}
        named = {key: pair and {"base": _plain(pair[0]), "tuned": _plain(pair[1])} for key, pair in both.items()}
        return {"measure": self.measure, "rows": self.rows, "leaked": self.leaked, **named}


def leaked_rows(base: Evaluation | None, tuned: Evaluation, locations: Collection[str]) -> Leaked | None:
    """None where no row is leaked. locations: of the rows that `finetune check` calls so."""
    clean = [i for i, row in enumerate(tuned.results) if row.location not in locations]
    rows = len(tuned.results)
    if len(clean) == rows:
        return None
    judged = tuned.accuracy is not None
    measure = tuned.measure if judged else "loss"

    def both(which: Sequence[int]) -> tuple[Figure | None, Figure]:
        before = None if base is None else figure_of([base.results[i] for i in which], judged)
        return before, figure_of([tuned.results[i] for i in which], judged)

    return Leaked(measure, rows, rows - len(clean), both(range(rows)), both(clean) if clean else None)


def figure_of(rows: Sequence[RowResult], judged: bool) -> Figure:
    """judged: by the share that is right; else by the loss per token."""
    if judged:
        right = sum(bool(row.correct) for row in rows)
        return Figure(right / len(rows), wilson_interval(right, len(rows)))
    losses, tokens = [row.loss for row in rows], [row.tokens for row in rows]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    return Figure(mean, weighted_mean_interval(losses, tokens) if len(rows) > 1 else None)


def _pair(base: Figure | None, tuned: Figure) -> str:
    return _words(tuned) if base is None else f"{_words(base)} before, {_words(tuned)} after"


def _words(figure: Figure) -> str:
    bounds = figure.interval
    return f"{figure.value:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def _plain(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)
