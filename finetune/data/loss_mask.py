"""Rendered text to tokens and weights: one function for every row of every format."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from finetune.data.rows import Rendered, Span
from finetune.data.tokenizer import Encoded, Tokenizer, begin_tokens, encode, encode_prompts, with_begin
from finetune.errors import RecipeError


@dataclass(frozen=True)
class Tokenised:
    """An example's tokens, and where its answer stands among them."""

    rendered: Rendered
    tokens: list[int]
    weights: list[float]  # 1 where supervised
    answer: Span | None  # in tokens, the end token left out
    split: bool = False  # a token lay across the answer's beginning, so the segments were encoded apart
    cut: bool = False  # its end is missing

    def __len__(self) -> int:
        return len(self.tokens)


def tokenise(tokenizer: Tokenizer, texts: Sequence[Rendered]) -> Iterator[Tokenised]:
    """The whole text is encoded once; the tokens of the prompt alone are always the beginning of the whole's.

    Weights are 1 exactly on the tokens of the supervised spans and on the EOS that is added where the text does
    not end by itself; never on the begin token. Raises RecipeError where EOS is needed and there is none.
    """
    prefix, eos = begin_tokens(tokenizer), tokenizer.eos_token_id
    if eos is None and any(not one.closed for one in texts):
        raise RecipeError("prompt.end_token: the tokenizer has no EOS token; set prompt.end_token: false")
    whole = encode(tokenizer, [one.text for one in texts])
    prompts = encode_prompts(tokenizer, [one.prompt for one in texts])
    for rendered, encoded, prompt in zip(texts, whole, prompts, strict=True):
        found = _place(rendered, encoded, prefix)
        if found is None or (found.answer and found.tokens[: found.answer[0]] != prompt):
            found = _apart(tokenizer, rendered, prefix)
        yield _finish(found, eos)


def _place(rendered: Rendered, encoded: Encoded, prefix: list[int]) -> Tokenised | None:
    """Spans of characters to spans of tokens; None where a token lies across the beginning of an answer."""
    tokens = with_begin(encoded.tokens, prefix)
    added = len(tokens) - len(encoded.tokens)
    ends = list(itertools.accumulate(map(itemgetter(1), encoded.spans), max))

    def index(character: int) -> int | None:
        at = bisect_right(ends, character)
        crosses = at < len(ends) and encoded.spans[at][0] < character
        return None if crosses else at + added

    borders = [index(edge) for span in (*rendered.supervised, *_answers(rendered)) for edge in span]
    if any(border is None for border in borders):
        return None
    return _weigh(rendered, tokens, [border for border in borders if border is not None], len(prefix))


def _answers(rendered: Rendered) -> list[Span]:
    return [rendered.answer] if rendered.answer else []


def _weigh(rendered: Rendered, tokens: list[int], borders: list[int], first: int) -> Tokenised:
    """borders: start and end in tokens of each supervised span, then of the answer."""
    weights = [0.0] * len(tokens)
    count = len(rendered.supervised)
    for start, end in zip(borders[: 2 * count : 2], borders[1 : 2 * count : 2], strict=True):
        weights[start:end] = [1.0] * (end - start)
    weights[: max(first, 1)] = [0.0] * min(max(first, 1), len(weights))  # nothing comes before to predict it from
    answer = (borders[-2], borders[-1]) if rendered.answer else None
    return Tokenised(rendered, tokens, weights, answer)


def _apart(tokenizer: Tokenizer, rendered: Rendered, prefix: list[int]) -> Tokenised:
    """The prompt and the answer encoded one by one; every segment, where that alone parts no earlier answer."""
    spans = (*rendered.supervised, *_answers(rendered))
    everywhere = sorted({0, len(rendered.text), *(edge for span in spans for edge in span)})
    once = [0, rendered.answer[0], len(rendered.text)] if rendered.answer else everywhere
    found = _place(rendered, _joined(tokenizer, rendered.text, once), prefix)
    found = found or _place(rendered, _joined(tokenizer, rendered.text, everywhere), prefix)
    assert found is not None, "no token lies across a border where the segments were encoded apart"
    return replace(found, split=True)


def _joined(tokenizer: Tokenizer, text: str, edges: Sequence[int]) -> Encoded:
    """The segments' tokens one after the other. A space that a tokenizer puts before a text belongs to its start."""
    tokens: list[int] = []
    spans: list[Span] = []
    segments = [text[start:end] for start, end in itertools.pairwise(edges)]
    for first, last, encoded in zip(edges, edges[1:], encode(tokenizer, segments), strict=False):
        tokens += encoded.tokens
        spans += [(first + start, min(first + max(end, start + 1), last)) for start, end in encoded.spans]
    return Encoded(tokens, spans)


def _finish(found: Tokenised, eos: int | None) -> Tokenised:
    """With EOS at the end, once, where the text does not close itself."""
    if found.rendered.closed or eos is None or (found.tokens and found.tokens[-1] == eos):
        return found
    return replace(found, tokens=[*found.tokens, eos], weights=[*found.weights, 1.0])
