"""The data's types: what a row is on its way from a file to a batch. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # whoever only reads rows needs no numpy
    from backends.interface import FloatArray, IntArray


@dataclass(frozen=True)
class Row:
    """One record as the file has it, and where it stands."""

    fields: Mapping[str, Any]
    file: str
    line: int  # 1-based line in the file; for Parquet and hub data the row's number

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Example:
    """One row as it is trained on. n is its length in tokens."""

    tokens: IntArray  # [n]
    weights: FloatArray  # [n] 1 where the token is supervised, 0 in the prompt
    place: str  # file:line
    answer: str | None = None  # the label or the expected answer (of the last turn)
    prompt: str = ""  # the rendered text before that answer
    answer_start: int | None = None  # the token that answer begins with; None: the last supervised run's first

    @property
    def prompt_tokens(self) -> IntArray:
        """The tokens before the last answer: what a model is given to answer. [p]"""
        if self.answer_start is not None:
            return self.tokens[: self.answer_start]
        supervised = self.weights > 0
        end = len(supervised)
        while end and not supervised[end - 1]:
            end -= 1
        while end and supervised[end - 1]:
            end -= 1
        return self.tokens[:end]


@dataclass(frozen=True)
class Dataset:
    """One split, prepared, with a plain account of what became of its rows."""

    examples: tuple[Example, ...]
    rows: int  # records in the file
    shortened: tuple[str, ...] = ()  # places of rows whose prompt or end was cut
    dropped: tuple[tuple[str, str], ...] = ()  # (place, reason) of rows not trained on
    notes: tuple[str, ...] = ()  # what a person should know of how the rows were read


@dataclass(frozen=True)
class Prepared:
    """Everything training and evaluation take from the data."""

    task: Literal["classification", "generation", "text"]
    format: str
    template: str
    train: Dataset
    valid: Dataset
    test: Dataset | None
    labels: tuple[str, ...] = ()  # classification: the labels in order
    label_tokens: tuple[tuple[int, ...], ...] = ()  # what each label looks like after the prompt
    stop_tokens: frozenset[int] = field(default_factory=frozenset)

    @property
    def held_out(self) -> Dataset:
        """The rows of the final figures."""
        return self.test or self.valid
