"""Types of evaluation results."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from finetune.evaluation.intervals import per_class
from finetune.evaluation.pairs import PairFigures
from finetune.recipe.schema import AnswerPart, measure_name


@dataclass(frozen=True)
class RowResult:
    """One held-out row under one model."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    location: Annotated[str, Field(validation_alias="place")]  # file:line
    prompt: str
    expected: str | None
    predicted: str | None  # None where only the loss is measured
    correct: bool | None
    loss: float  # mean negative log-likelihood of its supervised tokens, nats
    tokens: int  # supervised
    compared: tuple[str | None, str | None] | None = None  # parts of both answers; None: the answers as they are
    ended: bool | None = None  # whether a written answer ended by itself; None: none was written, or it is not known

    @property
    def judged(self) -> tuple[str | None, str | None]:
        """What is expected, and what was predicted, as they are compared."""
        return self.compared or (self.expected, self.predicted)


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of rows. In files a row's location has the key `place`."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    rows: int
    tokens: int  # supervised
    loss: float  # nats per supervised token; of pairs of answers, per pair
    perplexity: float | None  # of pairs None, as they are compared whole
    token_accuracy: float | None  # the same
    accuracy: float | None  # of labels, of whole answers word for word, or the preference accuracy; None for plain text
    interval: tuple[float, float] | None  # of the accuracy, 95 %
    macro_f1: float | None
    labels: tuple[str, ...]
    confusion: list[list[int]] | None  # [true][predicted]
    results: tuple[RowResult, ...]
    macro_f1_interval: tuple[float, float] | None = None  # 95 %; runs of 0.1.0 have none
    compared: AnswerPart = "all"  # of open answers; of the rest nothing is told by it
    pairs: PairFigures | None = None  # of pairs of answers; elsewhere None
    unread: tuple[int, int] = (0, 0)  # rows whose expected, and whose predicted answer has no such part

    @property
    def measure(self) -> str:
        """The name of `accuracy`; where there is none, the loss is the measure."""
        return "loss" if self.accuracy is None else measure_name(self.labels, self.pairs, self.compared)

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each label."""
        return per_class(np.array(self.confusion), self.labels) if self.confusion else []

    def label_numbers(self) -> tuple[list[int], list[int]]:
        """The true and the predicted label of each row, as indices of `labels`. [n] each"""
        number = {label: i for i, label in enumerate(self.labels)}
        rows = self.results
        return [number[str(row.expected)] for row in rows], [number[str(row.predicted)] for row in rows]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, for JSON."""
        absent = {"results"} if self.pairs else {"results", "pairs"}
        return {key: value for key, value in self._values().items() if key not in absent} | {"classes": self.classes}

    def to_json(self) -> dict[str, Any]:
        """Everything, rows included; pydantic reads it back."""
        results = [{"place": row.pop("location")} | row for row in map(asdict, self.results)]
        values = self._values() | {"results": results}
        return values if self.pairs else {key: value for key, value in values.items() if key != "pairs"}

    def _values(self) -> dict[str, Any]:
        """Without the rows. The confusions are not copied: of 1,500 labels there are 2 million."""
        return asdict(replace(self, results=(), confusion=None)) | {"confusion": self.confusion}
