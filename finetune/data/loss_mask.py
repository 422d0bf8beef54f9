"""Rendered text to tokens and loss weights: one function for all formats."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backends.interface import FloatArray
from finetune.data.rows import Example, Rendered, Span
from finetune.data.tokenizer import Encoded, Tokenizer, begin_tokens, encode, fixed_tokens, with_begin
from finetune.errors import RecipeError


@dataclass(frozen=True, slots=True)
class _Aligned:
    """A text's tokens, and where its supervised spans, and after them its answer, begin and end among them."""

    tokens: list[int]
    borders: list[int]
    added: int  # begin tokens that the text does not have itself
    apart: bool = False


def tokenise(tokenizer: Tokenizer, texts: Sequence[Rendered]) -> Iterator[Example]:
    """The whole text is encoded once; the tokens of the prompt alone are always the beginning of the whole's.

    Weights are 1 exactly on the tokens of the supervised spans and on the EOS that is added where the text does
    not end by itself; never on the begin token. Raises RecipeError where EOS is needed and there is none.
    """
    begin, eos = begin_tokens(tokenizer), tokenizer.eos_token_id
    if eos is None and any(not rendered.closed for rendered in texts):
        raise RecipeError("prompt.end_token: the tokenizer has no EOS token; set prompt.end_token: false")
    encoded = list(encode(tokenizer, [rendered.text for rendered in texts]))
    aligned = [_align(rendered, tokens, begin) for rendered, tokens in zip(texts, encoded, strict=True)]
    fixed = fixed_tokens(tokenizer)
    ends = [_prompt_end(*row, begin, fixed) for row in zip(texts, encoded, aligned, strict=True)]
    wanted = list(dict.fromkeys(text for text, _ in ends if text is not None))
    alone = dict(zip(wanted, (one.tokens for one in encode(tokenizer, wanted)), strict=True))
    for rendered, row, (text, start) in zip(texts, aligned, ends, strict=True):
        if row is None or not _same_prompt(row, alone, text, start, begin):
            row = _encode_apart(tokenizer, rendered, begin)
        yield _example(rendered, row, len(begin), eos)


def _align(rendered: Rendered, encoded: Encoded, begin: list[int]) -> _Aligned | None:
    """Spans of characters to spans of tokens; None where a token lies across the beginning of an answer."""
    tokens = with_begin(encoded.tokens, begin)
    added = len(tokens) - len(encoded.tokens)
    borders = []
    for span in (*rendered.supervised, *_answers(rendered)):
        for character in span:
            border = encoded.border(character)
            if border is None:
                return None
            borders.append(border + added)
    return _Aligned(tokens, borders, added)


def _answers(rendered: Rendered) -> list[Span]:
    return [rendered.answer] if rendered.answer else []


def _prompt_end(
    rendered: Rendered, encoded: Encoded, row: _Aligned | None, begin: list[int], fixed: Collection[int]
) -> tuple[str | None, int]:
    """A text that tells the prompt's tokens when it is encoded alone, and the token in the row that it begins with.

    A special token parts a text: what stands before it changes nothing in what stands after. So it is the prompt from
    its last special token on, which in a chat is the same text for all rows; the whole prompt where there is none.
    """
    if row is None or rendered.answer is None:
        return None, 0
    start = row.borders[-2] - row.added  # of the answer, among the text's own tokens
    if start >= len(begin):
        for token in range(start - 1, -1, -1):
            if encoded.tokens[token] in fixed:
                return rendered.text[encoded.start(token) : rendered.answer[0]], token + row.added
    return rendered.prompt, 0


def _same_prompt(row: _Aligned, alone: Mapping[str, list[int]], text: str | None, start: int, begin: list[int]) -> bool:
    """Whether the row begins with the tokens that the prompt has when it is encoded alone."""
    if text is None:
        return True
    expected = alone[text] if start else with_begin(alone[text], begin)
    return row.tokens[start : row.borders[-2]] == expected


def _encode_apart(tokenizer: Tokenizer, rendered: Rendered, begin: list[int]) -> _Aligned:
    """The prompt and the answer encoded one by one; every segment, where that alone parts no earlier answer."""
    spans = (*rendered.supervised, *_answers(rendered))
    everywhere = sorted({0, len(rendered.text), *(edge for span in spans for edge in span)})
    around_answer = [0, rendered.answer[0], len(rendered.text)] if rendered.answer else everywhere
    row = _align(rendered, _joined(tokenizer, rendered.text, around_answer), begin)
    row = row or _align(rendered, _joined(tokenizer, rendered.text, everywhere), begin)
    assert row is not None, "no token lies across a border where the segments were encoded apart"
    return _Aligned(row.tokens, row.borders, row.added, apart=True)


def _joined(tokenizer: Tokenizer, text: str, edges: Sequence[int]) -> Encoded:
    """The segments' tokens one after the other. A space that a tokenizer puts before a text belongs to its start."""
    tokens: list[int] = []
    spans: list[Span] = []
    segments = [text[start:end] for start, end in itertools.pairwise(edges)]
    for first, last, encoded in zip(edges, edges[1:], encode(tokenizer, segments), strict=False):
        tokens += encoded.tokens
        spans += [(first + start, min(first + max(end, start + 1), last)) for start, end in encoded.spans]
    return Encoded(tokens, spans)


def _example(rendered: Rendered, row: _Aligned, begin: int, eos: int | None) -> Example:
    """With EOS at the end, once, where the text does not close itself. begin: how many begin tokens there are."""
    tokens = row.tokens
    weights = _mask(len(tokens), row.borders[: 2 * len(rendered.supervised)], max(begin, 1))
    if not rendered.closed and eos is not None and tokens[-1:] != [eos]:
        tokens, weights = [*tokens, eos], np.append(weights, np.float32(1))
    answer = rendered.answer
    return Example(
        tokens=np.array(tokens, np.int32),
        weights=weights,
        location=rendered.record.location,
        answer=_answer(rendered).strip() if answer else None,
        prompt=rendered.prompt,
        answer_start=row.borders[-2] if answer else None,
        answer_end=row.borders[-1] if answer else None,
        apart=row.apart,
    )


def _mask(count: int, borders: Sequence[int], first: int) -> FloatArray:
    """1 in each supervised span, but not before token `first`: nothing comes before to predict it from. [count]

    borders: start and end of each span, in tokens.
    """
    weights = np.zeros(count, np.float32)
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        weights[start:end] = 1.0
    weights[:first] = 0.0
    return weights


def _answer(rendered: Rendered) -> str:
    """The label, or the words of the last answer."""
    if rendered.record.answer is not None:
        return rendered.record.answer
    return rendered.text[slice(*rendered.answer)] if rendered.answer else ""
