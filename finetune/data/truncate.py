"""Rows longer than max_length: truncated, or left out with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from finetune.data.loss_mask import tokenise
from finetune.data.rows import Example, Record, Rendered, Renderer
from finetune.data.tokenizer import Tokenizer, encode

MANY = 200  # messages
Policy = Literal["prompt", "end", "drop", "error"]
Pair = tuple[Rendered, Example]  # a row as text and as tokens
Numbered = tuple[int, Pair]  # with its number in a batch of rows
Fitted = Pair | str  # a row that fits, or the reason why it is left out


def fit(
    tokenizer: Tokenizer, renderer: Renderer, rows: Sequence[Pair], max_length: int, policy: Policy
) -> list[Fitted]:
    """Every row within max_length tokens, and none without a supervised token; in the order of the rows.

    prompt: the begin token, the template and the whole answer stay; early turns go first, then the end of the
    longest text of the prompt. Plain text has no prompt, and its end is cut.
    """
    fitted: dict[int, Fitted] = {}
    closed: list[Numbered] = []  # long rows whose prompt is to be shortened
    for number, (rendered, example) in enumerate(rows):
        if len(example) <= max_length:
            fitted[number] = rendered, example
        elif policy == "error":
            fitted[number] = f"{len(example)} tokens, and train.max_length is {max_length}"
        elif policy == "drop":
            fitted[number] = _too_long(example, max_length)
        elif policy == "end" or rendered.answer is None:
            fitted[number] = rendered, _cut(example, max_length)
        else:
            closed.append((number, (rendered, example)))
    fitted.update(_shorten(tokenizer, renderer, closed, max_length))
    return [_nothing_learned(fitted[number]) or fitted[number] for number in range(len(rows))]


def overlap(max_length: int) -> int:
    """The tokens of a window that the one before it has too: what its text goes on from."""
    return max_length // 8


def windows(example: Example, max_length: int, begin: Sequence[int]) -> list[Example]:
    """A long row of plain text as rows of at most max_length tokens, each token learned once.

    begin: what the tokenizer puts before a text; each window has it. Tokens that the window before has learned are not
    supervised again.
    """
    shared, start = overlap(max_length), 0
    begins = len(begin) if example.tokens[: len(begin)].tolist() == list(begin) else 0
    head, no_weight = example.tokens[:begins], np.zeros(begins, np.float32)
    tokens, weights = example.tokens[begins:], example.weights[begins:]
    size = max_length - begins
    found: list[Example] = []
    while True:
        learned = weights[start : start + size].copy()
        learned[: shared if start else 0] = 0.0
        last = start + size >= len(tokens)
        part = np.concatenate([head, tokens[start : start + size]]), np.concatenate([no_weight, learned])
        found.append(dataclasses.replace(example, tokens=part[0], weights=part[1], piece=not last))
        if last:
            return found
        start += size - shared


def _too_long(example: Example, max_length: int) -> str:
    return f"{len(example)} tokens, more than train.max_length {max_length}"


def _nothing_learned(row: Fitted) -> str | None:
    if isinstance(row, str):
        return None
    _, example = row
    if example.answer_start is not None and example.answer_start >= len(example):
        return "nothing of the answer is left within train.max_length"
    return None if example.weights.any() else "no token is supervised"


def _cut(example: Example, max_length: int) -> Example:
    end = None if example.answer_end is None else min(example.answer_end, max_length)
    tokens, weights = example.tokens[:max_length], example.weights[:max_length]
    return dataclasses.replace(example, tokens=tokens, weights=weights, answer_end=end, cut=True)


def _shorten(
    tokenizer: Tokenizer, renderer: Renderer, rows: Sequence[Numbered], max_length: int
) -> Iterator[tuple[int, Fitted]]:
    """All long rows together, a little shorter in every round, until each fits or has nothing left to give."""
    while rows:
        fewer = [(number, shorter) for number, row in rows if (shorter := _drop_turns(renderer, row, max_length))]
        done = {number for number, _ in fewer}
        cut, stuck = _cut_parts(tokenizer, renderer, [pair for pair in rows if pair[0] not in done], max_length)
        for number, (_, example) in stuck:
            yield number, f"{_too_long(example, max_length)}: its answer and the template alone fill it"
        tried = [*fewer, *cut]
        examples = tokenise(tokenizer, [rendered for _, rendered in tried])
        rows = []
        for (number, rendered), example in zip(tried, examples, strict=True):
            if len(example) <= max_length:
                yield number, (rendered, example)
            else:
                rows.append((number, (rendered, example)))


def _drop_turns(renderer: Renderer, row: Pair, max_length: int) -> Rendered | None:
    rendered, example = row
    # Half of what must go, since tokens are spread unevenly over the characters; the next round takes more. Of a long
    # conversation nearly all: each round renders every turn that is left.
    step = 0.95 if len(rendered.record.messages) > MANY else 0.5
    share = step * (len(example) - max_length) / len(example)
    record = renderer.drop_turns(rendered.record, share)
    return _render(renderer, record) if record else None


def _render(renderer: Renderer, record: Record) -> Rendered | None:
    """None where a template refuses the shorter record."""
    try:
        return renderer.render(record)[-1]
    except ValueError:
        return None


def _cut_parts(
    tokenizer: Tokenizer, renderer: Renderer, rows: Sequence[Numbered], max_length: int
) -> tuple[list[tuple[int, Rendered]], list[Numbered]]:
    """Each row with its longest part cut at the end; and the rows that have no part to cut."""
    parts = [renderer.parts(rendered.record) for _, (rendered, _) in rows]
    names = [max(part, key=lambda name: len(part[name]), default="") for part in parts]
    encoded = encode(tokenizer, [part.get(name, "") for part, name in zip(parts, names, strict=True)])
    shorter: list[tuple[int, Rendered]] = []
    stuck: list[Numbered] = []
    for row, part, name, longest in zip(rows, parts, names, encoded, strict=True):
        number, (whole, example) = row
        tokens = len(longest.tokens)
        keep = tokens - (len(example) - max_length)
        end = min(longest.spans[max(keep, 1)][0] if tokens > 1 else 0, len(part.get(name, "")) - 1)
        record = renderer.shorten(whole.record, name, part[name][:end]) if end > 0 else None
        rendered = record and _render(renderer, record)
        if rendered:
            shorter.append((number, rendered))
        else:
            stuck.append(row)
    return shorter, stuck
