"""The data's types: what a row is on its way from a file to a batch, and how it becomes text. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # whoever only reads rows needs no numpy
    from backends.interface import FloatArray, IntArray

Message = Mapping[str, Any]  # role, content (text), and where given tool_calls, name, tool_call_id, weight
Span = tuple[int, int]  # (start, end) in characters


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
class Record:
    """One row, ready to be written as text."""

    place: str
    key: str = ""  # records of the same key ask the same thing, and stay on one side of a split
    values: Mapping[str, str] = field(default_factory=dict)  # by standard name and by the file's own
    answer: str | None = None  # the label, completion or output
    messages: tuple[Message, ...] = ()  # chat and sharegpt
    tools: tuple[Any, ...] = ()
    last_only: bool = False  # only the last assistant turn is supervised


@dataclass(frozen=True)
class Rendered:
    """A whole example as text; training adds the begin token, and EOS where `closed` is false."""

    record: Record
    text: str
    supervised: tuple[Span, ...]
    answer: Span | None  # the last answer, its end token left out
    closed: bool  # nothing is to be added at the end

    @property
    def prompt(self) -> str:
        return self.text[: self.answer[0]] if self.answer else ""


class Renderer(Protocol):
    """How records become text."""

    name: str  # chat, plain, alpaca, or the recipe's own template

    def render(self, record: Record) -> list[Rendered]:
        """One example; more where a conversation must be unrolled. Raises ValueError with the reason."""

    def question(self, record: Record) -> str:
        """The prompt alone, up to where the model answers."""

    def with_answer(self, record: Record, answer: str) -> Record:
        """The record with another label."""

    def parts(self, record: Record) -> Mapping[str, str]:
        """The texts of the prompt that may be shortened, by name."""

    def shorten(self, record: Record, part: str, text: str) -> Record:
        """The record with one of those texts replaced."""

    def drop_turns(self, record: Record, share: float) -> Record | None:
        """Without its earliest exchanges: that share of its characters, one at least; None when one is left."""


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
