"""The text of an example, and where its answers stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from finetune.data.records import Record

Span = tuple[int, int]  # (start, end) in characters


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
