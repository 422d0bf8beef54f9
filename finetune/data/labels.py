"""Labels as tokens after a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from finetune.data.label_names import Labels
from finetune.data.loss_mask import tokenise
from finetune.data.rows import Example, Record, Renderer
from finetune.data.tokenizer import Tokenizer
from finetune.errors import RecipeError

LabelTokens = tuple[tuple[int, ...], ...]


def label_tokens(
    tokenizer: Tokenizer, renderer: Renderer, record: Record, labels: Labels
) -> tuple[LabelTokens, LabelTokens]:
    """Each label's tokens after a prompt: as they are scored, and alone.

    They are scored with the end token where one label is the beginning of another. record: any rendered row,
    whose prompt the labels follow. Raises RecipeError for labels that cannot be told apart.
    """
    rendered = [renderer.render(renderer.with_answer(record, label))[-1] for label in labels]
    bare, ended = [], []
    for example in tokenise(tokenizer, rendered):
        start = len(example) if example.answer_start is None else example.answer_start
        bare.append(tuple(example.tokens[start : example.answer_end].tolist()))
        ended.append(tuple(example.tokens[start:].tolist()))
    order = sorted(range(len(labels)), key=lambda i: (bare[i], i))
    for a, b in pairwise(order):  # of all that begin with a label the first stands next to it
        if bare[b][: len(bare[a])] != bare[a]:
            continue
        if bare[a] == bare[b]:
            raise RecipeError(f"labels {labels[a]!r} and {labels[b]!r} are the same tokens to the model; rename one")
        if ended[a] == bare[a]:
            raise RecipeError(
                f"label {labels[b]!r} begins with label {labels[a]!r}; set prompt.end_token: true, or rename one"
            )
        return tuple(ended), tuple(bare)
    return tuple(bare), tuple(bare)


class LabelWriter:
    """Writes each label in the same tokens in every row, whatever prompt it follows."""

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer, labels: Labels) -> None:
        """labels: empty where the answers are open; then rows stay as they are."""
        self.labels = labels
        self.scored: LabelTokens = ()  # each label's tokens as they are scored, once a row is written
        self._alone: dict[str, tuple[int, ...]] = {}  # without an end token
        self._tokenizer, self._renderer = tokenizer, renderer

    def write(self, record: Record, example: Example) -> Example:
        """The example with its label in those tokens, which the first row decides. Raises as `label_tokens` does."""
        if not self.labels:
            return example
        if not self.scored:
            self.scored, alone = label_tokens(self._tokenizer, self._renderer, record, self.labels)
            self._alone = dict(zip(self.labels, alone, strict=True))
        return _with_label(example, self._alone[record.answer or ""])


class ClassWriter:
    """Writes each label as its number, after the prompt: what a head chooses among."""

    def __init__(self, labels: Labels) -> None:
        self.scored: LabelTokens = tuple((number,) for number in range(len(labels)))
        self._numbers = {label: number for number, label in enumerate(labels)}

    def write(self, record: Record, example: Example) -> Example:
        """The prompt, and the class after its last token. Raises ValueError where there is no token before it."""
        prompt = example.prompt_tokens
        count = len(prompt)
        if not count:
            raise ValueError("has no token before its label; write some text around {text} in prompt.template")
        return dataclasses.replace(
            example,
            tokens=np.append(prompt, np.int32(self._numbers[record.answer or ""])),
            weights=np.append(np.zeros(count, np.float32), np.float32(1.0)),
            answer_start=count,
            answer_end=count + 1,
            apart=False,
            cut=False,
            classed=True,
        )


def _with_label(example: Example, tokens: Sequence[int]) -> Example:
    """The example with its label written in `tokens`, which are without the end token."""
    start, end = example.answer_start, example.answer_end
    if example.cut or start is None or end is None or example.tokens[start:end].tolist() == list(tokens):
        return example
    weight = example.weights[start] if start < end else 0.0
    label, weights = np.array(tokens, np.int32), np.full(len(tokens), weight, np.float32)
    return dataclasses.replace(
        example,
        tokens=np.concatenate([example.tokens[:start], label, example.tokens[end:]]),
        weights=np.concatenate([example.weights[:start], weights, example.weights[end:]]),
        answer_end=start + len(tokens),
        apart=True,
    )
