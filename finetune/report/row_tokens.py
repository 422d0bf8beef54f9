"""A row's tokens, marked for reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from finetune.data.rows import Example
from finetune.text import one_line

SHOWN_TOKENS = 160  # of a row; the middle of a longer row is left out
_LONGEST = 8  # tokens that make up a single character


def highlighted(example: Example, tokenizer: Any) -> Text:
    """The row's tokens, the supervised ones marked and in brackets; set in, as no line of ours is."""
    half = SHOWN_TOKENS // 2
    text = Text("  ")
    pieces = list(_pieces(example, tokenizer))
    long = len(pieces) > SHOWN_TOKENS
    for number, (piece, supervised) in enumerate(pieces):
        if long and half <= number < len(pieces) - half:
            if number == half:
                text.append(" ... ", style="dim")
            continue
        piece = one_line(piece)
        text.append(f"[{piece}]" if supervised else piece, style="bold green" if supervised else "dim")
    return text


def _pieces(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, supervised) of each token; tokens that are parts of one character are joined."""
    tokens: Sequence[int] = example.tokens.tolist()
    if example.classed:
        tokens = tokens[:-1]
    start = 0
    while start < len(tokens):
        supervised = bool(example.weights[start])
        for end in range(start + 1, min(start + _LONGEST, len(tokens)) + 1):
            piece = tokenizer.decode(tokens[start:end])
            if not piece.endswith("\ufffd") or bool(example.weights[end - 1]) != supervised:
                break
        else:
            end, piece = start + 1, tokenizer.decode(tokens[start : start + 1])
        yield piece, supervised
        start = end
    if example.classed:
        yield example.answer or "", True
