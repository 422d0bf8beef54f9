"""Rows longer than max_length: shortened, cut, dropped or refused, and every one of them counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from finetune.data.loss_mask import Tokenised, tokenise
from finetune.data.problems import Problem, settle
from finetune.data.rows import Record, Rendered, Renderer
from finetune.data.tokenizer import Tokenizer, encode

Policy = Literal["prompt", "end", "drop", "error"]


@dataclass
class Fitted:
    """Rows that fit, in their order, and what was done to the others."""

    kept: list[Tokenised]
    shortened: list[str] = field(default_factory=list)  # places
    dropped: list[Problem] = field(default_factory=list)  # (place, reason)


def fit(tokenizer: Tokenizer, renderer: Renderer, rows: Sequence[Tokenised], max_length: int, policy: Policy) -> Fitted:
    """Every row within max_length tokens, and none without a supervised token.

    prompt: the begin token, the template and the whole answer stay; early turns go first, then the end of the
    longest text of the prompt. Plain text has no prompt, and its end is cut. Raises DataError for policy error.
    """
    found: dict[int, Tokenised] = {}
    fitted = Fitted([])
    long = []
    for number, row in enumerate(rows):
        if len(row) <= max_length:
            found[number] = row
        else:
            long.append((number, row))
    if policy == "error":
        settle([(_place(row), f"{len(row)} tokens, and train.max_length is {max_length}") for _, row in long], "stop")
    if policy == "drop":
        fitted.dropped += [(_place(row), _too_long(row, max_length)) for _, row in long]
    else:
        open_end = [(number, row) for number, row in long if policy == "end" or row.answer is None]
        found.update((number, _cut(row, max_length)) for number, row in open_end)
        closed = [(number, row) for number, row in long if policy == "prompt" and row.answer is not None]
        found.update(_shorten(tokenizer, renderer, closed, max_length, fitted.dropped))
        fitted.shortened = [_place(row) for number, row in long if number in found]
    for number in sorted(found):
        reason = _nothing_learned(found[number])
        if reason:
            fitted.dropped.append((_place(found[number]), reason))
        else:
            fitted.kept.append(found[number])
    return fitted


def _place(row: Tokenised) -> str:
    return row.rendered.record.place


def _too_long(row: Tokenised, max_length: int) -> str:
    return f"{len(row)} tokens, more than train.max_length {max_length}"


def _nothing_learned(row: Tokenised) -> str | None:
    if row.answer is not None and row.answer[0] >= len(row):
        return "nothing of the answer is left within train.max_length"
    if not any(row.weights):
        return "no token is supervised"
    return None


def _cut(row: Tokenised, max_length: int) -> Tokenised:
    answer = row.answer and (row.answer[0], min(row.answer[1], max_length))
    return dataclasses.replace(
        row, tokens=row.tokens[:max_length], weights=row.weights[:max_length], answer=answer, cut=True
    )


def _shorten(
    tokenizer: Tokenizer,
    renderer: Renderer,
    rows: Sequence[tuple[int, Tokenised]],
    max_length: int,
    dropped: list[Problem],
) -> Iterator[tuple[int, Tokenised]]:
    """All long rows together, a little shorter in every round, until each fits or has nothing left to give."""
    while rows:
        fewer = [(number, one) for number, row in rows if (one := _drop_turns(renderer, row, max_length))]
        done = {number for number, _ in fewer}
        cut, stuck = _cut_parts(tokenizer, renderer, [pair for pair in rows if pair[0] not in done], max_length)
        dropped += [
            (_place(row), f"{_too_long(row, max_length)}: its answer and the template alone fill it") for row in stuck
        ]
        tried = [*fewer, *cut]
        tokenised = tokenise(tokenizer, [rendered for _, rendered in tried])
        rows = []
        for (number, _), row in zip(tried, tokenised, strict=True):
            if len(row) <= max_length:
                yield number, row
            else:
                rows.append((number, row))


def _drop_turns(renderer: Renderer, row: Tokenised, max_length: int) -> Rendered | None:
    # Half of what must go, since tokens are spread unevenly over the characters; the next round takes more.
    share = (len(row) - max_length) / len(row) / 2
    record = renderer.drop_turns(row.rendered.record, share)
    return _render(renderer, record) if record else None


def _render(renderer: Renderer, record: Record) -> Rendered | None:
    """None where a template refuses the shorter record."""
    try:
        return renderer.render(record)[-1]
    except ValueError:
        return None


def _cut_parts(
    tokenizer: Tokenizer, renderer: Renderer, rows: Sequence[tuple[int, Tokenised]], max_length: int
) -> tuple[list[tuple[int, Rendered]], list[Tokenised]]:
    """Each row with its longest part cut at the end; and the rows that have no part to cut."""
    parts = [renderer.parts(row.rendered.record) for _, row in rows]
    names = [max(part, key=lambda name: len(part[name]), default="") for part in parts]
    encoded = encode(tokenizer, [part.get(name, "") for part, name in zip(parts, names, strict=True)])
    shorter: list[tuple[int, Rendered]] = []
    stuck: list[Tokenised] = []
    for (number, row), part, name, tokens in zip(rows, parts, names, encoded, strict=True):
        keep = len(tokens.tokens) - (len(row) - max_length)
        end = tokens.spans[max(keep, 1)][0] if len(tokens.tokens) > 1 else 0
        end = min(end, len(part.get(name, "")) - 1)
        record = renderer.shorten(row.rendered.record, name, part[name][:end]) if end > 0 else None
        rendered = record and _render(renderer, record)
        if rendered:
            shorter.append((number, rendered))
        else:
            stuck.append(row)
    return shorter, stuck
