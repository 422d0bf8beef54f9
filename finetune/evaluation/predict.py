"""Predictions for rows without answers: label probabilities, or generated text."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from backends.interface import Reader
from finetune.data.rows import Prepared
from finetune.data.tokenizer import Tokenizer, answer_text
from finetune.evaluation.scoring import label_logprobs, write_answers
from finetune.events import Progress
from finetune.recipe.schema import Recipe


@dataclass(frozen=True)
class Prediction:
    predicted: str  # the label, or the answer
    probabilities: tuple[float, ...] = ()  # of each label; together 1


def predict(
    session: Reader, recipe: Recipe, prepared: Prepared, tokenizer: Tokenizer, max_tokens: int, what: str = ""
) -> Generator[Progress, None, list[Prediction]]:
    """Of each row of `prepared.held_out`, as evaluation has them. Raises MemoryExhausted, which names the row.

    what: names the progress, if not "labels" or "answers".
    """
    examples = prepared.held_out.examples
    if prepared.task != "classification":
        stop = prepared.stop_tokens
        answers = yield from write_answers(
            session, examples, stop, max_tokens, lambda tokens: answer_text(tokenizer, tokens, stop), what or "answers"
        )
        return [Prediction(answer.text) for answer in answers]
    micro_tokens = recipe.train.tokens_at_once
    scoring = label_logprobs(session, examples, prepared.label_tokens, micro_tokens, what or "labels")
    logprobs = yield from scoring  # [n, labels]
    likely = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    shares = likely / likely.sum(axis=1, keepdims=True)
    chosen = logprobs.argmax(axis=1).tolist()
    return [Prediction(prepared.labels[label], tuple(row)) for label, row in zip(chosen, shares.tolist(), strict=True)]
