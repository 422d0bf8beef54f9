"""Share of rows with a property, the rows, and the share's interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from finetune.evaluation.intervals import wilson_interval


@dataclass(frozen=True)
class Found:
    """The rows of one kind under one model."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    count: int
    share: float  # of the rows that were looked at
    interval: tuple[float, float]  # of the share, 95 %
    rows: tuple[int, ...] = ()  # numbers of lines of rows.jsonl, from 0

    @classmethod
    def of(cls, rows: Sequence[int], measured: int) -> Found:
        return cls(len(rows), len(rows) / max(measured, 1), wilson_interval(len(rows), measured), tuple(rows))
