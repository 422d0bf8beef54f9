"""How good is the model? One code for every backend, for the base and for the tuned model alike.

The whole set, the same rows in the same order in every call, whatever the memory: batches are only
a way to get through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from backends.interface import Session, TrainState
from finetune.data.rows import Dataset, Prepared
from finetune.evaluation.intervals import confusion_matrix, macro_f1, per_class, wilson_interval
from finetune.evaluation.scoring import choose_labels, row_losses, write_answers
from finetune.events import Report


@dataclass(frozen=True)
class RowResult:
    """One held-out row under one model."""

    place: str
    prompt: str
    expected: str | None
    predicted: str | None  # None where only the loss is measured
    correct: bool | None
    loss: float  # mean negative log-likelihood of its supervised tokens, nats
    tokens: int  # supervised


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of rows."""

    rows: int
    tokens: int  # supervised
    loss: float  # nats a supervised token
    perplexity: float
    token_accuracy: float
    accuracy: float | None  # of labels, or of whole answers word for word; None for plain text
    interval: tuple[float, float] | None  # of the accuracy, 95 %
    macro_f1: float | None
    labels: tuple[str, ...]
    confusion: list[list[int]] | None  # [true][predicted]
    results: tuple[RowResult, ...]

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each label."""
        return per_class(np.array(self.confusion), self.labels) if self.confusion else []

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "results"} | {"classes": self.classes}


def evaluate(
    session: Session,
    prepared: Prepared,
    dataset: Dataset,
    *,
    micro_tokens: int,
    max_tokens: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Loss on every row; labels where there are labels; written answers where `max_tokens` allows any.

    Raises MemoryExhausted when even a single row does not fit.
    """
    examples = dataset.examples
    loss, correct, tokens, first = row_losses(session, examples, micro_tokens, report)
    predicted: list[str | None] = [None] * len(examples)
    if prepared.task == "classification":
        chosen = choose_labels(session, examples, prepared.label_tokens, micro_tokens, report, first)
        predicted = [prepared.labels[index] for index in chosen]
    elif prepared.task == "generation" and max_tokens and decode:
        predicted = list(write_answers(session, examples, prepared.stop_tokens, max_tokens, decode, report))
    results = tuple(
        RowResult(
            place=example.place,
            prompt=example.prompt,
            expected=example.answer,
            predicted=guess,
            correct=None if guess is None else guess.strip() == (example.answer or "").strip(),
            loss=float(loss[i] / tokens[i]),
            tokens=int(tokens[i]),
        )
        for i, (example, guess) in enumerate(zip(examples, predicted, strict=True))
    )
    return _summarise(prepared, results, float(loss.sum()), int(correct.sum()), int(tokens.sum()))


def _summarise(
    prepared: Prepared, results: tuple[RowResult, ...], loss: float, correct: int, tokens: int
) -> Evaluation:
    mean = loss / max(tokens, 1)
    judged = [row for row in results if row.correct is not None]
    right = sum(bool(row.correct) for row in judged)
    confusion, macro = None, None
    if prepared.task == "classification" and judged:
        index = {label: i for i, label in enumerate(prepared.labels)}
        matrix = confusion_matrix(
            [index[str(row.expected)] for row in judged],
            [index[str(row.predicted)] for row in judged],
            len(index),
        )
        confusion = matrix.tolist()
        macro = macro_f1(matrix)
    return Evaluation(
        rows=len(results),
        tokens=tokens,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        token_accuracy=correct / max(tokens, 1),
        accuracy=right / len(judged) if judged else None,
        interval=wilson_interval(right, len(judged)) if judged else None,
        macro_f1=macro,
        labels=prepared.labels,
        confusion=confusion,
        results=results,
    )


@contextmanager
def base_weights(session: Session) -> Iterator[None]:
    """The session as the base model: every B is zero inside, and the adapter comes back after."""
    state = session.get_state()
    zero = {name: t * 0 if name.endswith("lora_B") else t for name, t in state.adapter.items()}
    session.set_state(TrainState(state.step, zero, state.moments))
    try:
        yield
    finally:
        session.set_state(state)
