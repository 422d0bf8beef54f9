"""Data types, from a row in a file to an example. Imports numpy only.

A source is read into `Row`s; each becomes a `Record` (checked, with standard names), a `Rendered` text and an `Example`
(tokens and weights). `Prepared` holds the examples of every split, with every problem that was met on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # whoever only reads rows needs no numpy
    from backends.interface import FloatArray, IntArray

Message = Mapping[str, Any]  # role, content (text), and where given tool_calls, name, tool_call_id, weight
Span = tuple[int, int]  # (start, end) in characters, or in tokens
Problem = tuple[str, str]  # (location, reason with its remedy); a location is file:line, or the recipe's key
Task = Literal["classification", "generation", "text", "preference"]


@dataclass(frozen=True, slots=True)
class Row:
    """One record as the file has it, and where it stands."""

    fields: Mapping[str, Any]
    file: str
    line: int  # 1-based line in the file; for Parquet and hub data the row's number
    rejected: Mapping[str, Any] | None = None  # of a pair of answers: the same fields with the worse one

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Record:
    """One row, ready to be written as text."""

    location: str
    key: str = ""  # records of the same key ask the same thing, and stay on one side of a split
    values: Mapping[str, str] = field(default_factory=dict)  # by standard name and by the file's own
    answer: str | None = None  # the label, completion or output
    messages: tuple[Message, ...] = ()  # chat and sharegpt
    tools: tuple[Any, ...] = ()
    last_only: bool = False  # only the last assistant turn is supervised
    system: str = ""  # beside an instruction or a prompt; a conversation has it as its first message
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) before an instruction or a prompt; not learned
    left_out: tuple[str, ...] = ()  # fields that no text can hold: columns that nothing reads, and what reading dropped
    rejected: Record | None = None  # of a pair of answers: the worse one to the same prompt


@dataclass(frozen=True, slots=True)
class Rendered:
    """A whole example as text; training adds the begin token, and EOS where `closed` is false."""

    record: Record
    text: str
    supervised: tuple[Span, ...]  # in characters
    answer: Span | None  # the last answer, its end token left out; in characters
    closed: bool  # nothing is to be added at the end

    @property
    def prompt(self) -> str:
        return self.text[: self.answer[0]] if self.answer else ""


class Renderer(Protocol):
    """How records become text."""

    name: str  # chat, plain, alpaca, or the recipe's own template
    reads: Collection[str]  # the parts and columns of a row that it writes
    source: str  # the chat template; empty where there is none
    clock: datetime | None  # the time that its template may write; None where it writes none

    def render(self, record: Record) -> list[Rendered]:
        """One example; more where a conversation must be unrolled. Raises ValueError with the reason."""

    def render_all(self, records: Sequence[Record]) -> list[list[Rendered] | ValueError]:
        """As `render`, for many; the reason stands where a record cannot be written."""

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


@dataclass(frozen=True, slots=True)
class Example:
    """One row as it is trained on. n is its length in tokens."""

    tokens: IntArray  # [n]
    weights: FloatArray  # [n] 1 where the token is supervised, 0 in the prompt
    location: str  # file:line
    answer: str | None = None  # the label or the expected answer (of the last turn)
    prompt: str = ""  # the rendered text before that answer
    answer_start: int | None = None  # the token that answer begins with; None: the last supervised run's first
    answer_end: int | None = None  # one past its last token, the end token left out
    apart: bool = False  # a token would lie across an answer's border, so prompt and answer were encoded apart
    cut: bool = False  # its end is missing
    piece: bool = False  # of a longer text, which goes on in the next example
    classed: bool = False  # its last number is the number of its label, and no token
    rejected: Example | None = None  # of a pair of answers: the worse one to the same prompt
    under_base: float = 0.0  # of a pair: the answer's log-probability under the model without its adapter

    def __len__(self) -> int:
        return len(self.tokens)

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

    @property
    def answer_tokens(self) -> IntArray:
        """The tokens of the last answer; its end token too where `answer_end` does not say where that stands. [a]"""
        return self.tokens[len(self.prompt_tokens) : self.answer_end]


@dataclass(frozen=True)
class Rows:
    """What one source held."""

    rows: list[Row]
    bad: list[Problem]  # rows that could not be read
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """The rows of one split, with an account of what became of each."""

    name: str  # train, valid or test
    rows: int  # in the file, or of what was set apart of it
    examples: tuple[Example, ...] = ()
    lengths: tuple[int, ...] = ()  # of the rows that could be written, in tokens, before any is cut
    shortened: tuple[str, ...] = ()  # locations of rows whose prompt or end was cut
    dropped: tuple[Problem, ...] = ()  # rows too long, or with nothing to learn, which the recipe leaves out
    bad: tuple[Problem, ...] = ()  # rows that cannot be read, or are not as the others
    refused: tuple[Problem, ...] = ()  # rows that the template cannot write
    too_long: tuple[Problem, ...] = ()  # where the recipe allows none
    notes: tuple[str, ...] = ()  # what a person should know of how the rows were read
    left_out_fields: Mapping[str, int] = field(default_factory=dict)  # field that stands in no text -> its rows
    lost_tokens: int = 0  # of `lengths`, by cutting and leaving out
    lost_supervised: int = 0  # of those
    records: list[Record] = field(default_factory=list, repr=False)  # the rows that are whole

    @property
    def left_out(self) -> tuple[Problem, ...]:
        """Every row that is not trained on, where bad rows are skipped."""
        return (*self.bad, *self.refused, *self.dropped)

    @cached_property
    def account(self) -> Mapping[str, Any]:
        """What became of every row, as all tables and JSON files have it."""
        lengths = sorted(map(len, self.examples))
        return {
            "rows": self.rows,
            "good": self.rows - len(self.bad),
            "used": len(self.examples),
            "tokens": sum(lengths),
            "supervised_tokens": int(sum(example.weights.sum() for example in self.examples)),
            "median_length": lengths[len(lengths) // 2] if lengths else 0,
            "longest": lengths[-1] if lengths else 0,
            "shortened": list(self.shortened),
            "dropped": [list(problem) for problem in self.left_out],
            "notes": list(self.notes),
            "left_out_fields": dict(self.left_out_fields),
            "lost_tokens": self.lost_tokens,
            "lost_supervised_tokens": self.lost_supervised,
        }


@dataclass(frozen=True)
class Prepared:
    """Everything training and evaluation take from the data, and every problem of it."""

    task: Task
    format: str
    template: str
    train: Split
    valid: Split  # without rows where none could be set apart
    test: Split | None = None
    labels: tuple[str, ...] = ()  # classification: the labels in order
    label_tokens: tuple[tuple[int, ...], ...] = ()  # what each label looks like after the prompt
    stop_tokens: frozenset[int] = frozenset()
    broken: tuple[tuple[str, Problem], ...] = ()  # (split, why it is not as the recipe asks), in the order met
    renderer: Renderer | None = field(default=None, repr=False)
    parted: bool = False  # validation rows were set apart from train
    parting: str | None = None  # how; None where they were not, or as 0.1.0 did

    @property
    def held_out(self) -> Split:
        """The rows of the final figures."""
        return self.test or self.valid

    @property
    def splits(self) -> tuple[Split, ...]:
        """Train, valid and test, where they have rows."""
        return tuple(split for split in (self.train, self.valid, self.test) if split and split.rows)

    @property
    def majority(self) -> float | None:
        """The share right of a model that always gives the most frequent label of the validation rows."""
        answers = Counter(example.answer for example in self.valid.examples)
        return max(answers.values()) / answers.total() if self.labels and answers else None

    def forget_records(self) -> None:
        """Frees the rows as records, which only `check` looks at."""
        for split in self.splits:
            split.records.clear()
