"""Labels: which there are, and what each looks like in tokens after a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from finetune.data.loss_mask import Tokenised, tokenise
from finetune.data.problems import Problem
from finetune.data.rows import Record, Renderer
from finetune.data.tokenizer import Tokenizer
from finetune.errors import DataError, RecipeError

Labels = tuple[str, ...]
LabelTokens = tuple[tuple[int, ...], ...]


def find_labels(records: Sequence[Record], given: Sequence[str] | None) -> Labels:
    """The labels in order: as the recipe gives them, else those of the training rows, whole numbers by value."""
    labels = tuple(given) if given is not None else tuple(sorted({one.answer or "" for one in records}, key=_rank))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        place = records[0].place if records else "data.train"
        raise DataError(f"{place}: classification needs two different labels, and there is {', '.join(labels)}")
    return labels


def _rank(label: str) -> tuple[bool, int, str]:
    whole = label.lstrip("-").isdecimal()
    return not whole, int(label) if whole else 0, label


def unknown_labels(records: Sequence[Record], labels: Labels) -> list[Problem]:
    """Rows whose label never occurs in the training rows."""
    known = set(labels)
    return [
        (one.place, f"label {one.answer!r} does not occur in the training rows ({', '.join(labels[:20])}); correct it")
        for one in records
        if one.answer not in known
    ]


def label_tokens(
    tokenizer: Tokenizer, renderer: Renderer, record: Record, labels: Labels
) -> tuple[LabelTokens, LabelTokens]:
    """Each label's tokens after a prompt: as they are scored, and alone.

    They are scored with the end token where one label is the beginning of another. record: any rendered row,
    whose prompt the labels follow. Raises RecipeError for labels that cannot be told apart.
    """
    rendered = [renderer.render(renderer.with_answer(record, label))[-1] for label in labels]
    bare, ended = [], []
    for one in tokenise(tokenizer, rendered):
        start, end = one.answer or (len(one), len(one))
        bare.append(tuple(one.tokens[start:end]))
        ended.append(tuple(one.tokens[start:]))
    for a, first in enumerate(bare):
        for b, second in enumerate(bare):
            if a == b or second[: len(first)] != first:
                continue
            if first == second:
                raise RecipeError(
                    f"labels {labels[a]!r} and {labels[b]!r} are the same tokens to the model; rename one"
                )
            if ended[a] == bare[a]:
                raise RecipeError(
                    f"label {labels[b]!r} begins with label {labels[a]!r}; set prompt.end_token: true, or rename one"
                )
            return tuple(ended), tuple(bare)
    return tuple(bare), tuple(bare)


def same_label_tokens(row: Tokenised, tokens: Sequence[int]) -> Tokenised:
    """The row with its label written in the tokens that are scored; `tokens` are without the end token."""
    start, end = row.answer or (len(row), len(row))
    if row.cut or row.tokens[start:end] == list(tokens):
        return row
    weight = row.weights[start] if start < end else 0.0
    return dataclasses.replace(
        row,
        tokens=[*row.tokens[:start], *tokens, *row.tokens[end:]],
        weights=[*row.weights[:start], *([weight] * len(tokens)), *row.weights[end:]],
        answer=(start, start + len(tokens)),
        split=True,
    )
