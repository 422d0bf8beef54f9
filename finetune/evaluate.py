"""How good is the model? One code for every backend, for the base and for the tuned model alike.

The whole set, the same rows in the same order in every call, whatever the memory: batches are only
a way to get through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from backends.interface import Batch, OutOfMemory, Session
from finetune.data.batches import evaluation_batches, halve
from finetune.errors import MemoryExhausted
from finetune.examples import Dataset, Example, Prepared
from finetune.statistics import confusion_matrix, macro_f1, per_class, wilson_interval

Report = Callable[[str, int, int], None]  # what, done, total
GENERATE_TOGETHER = 16  # prompts written at once


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


def scored(
    session: Session, examples: Sequence[Example], micro_tokens: int
) -> Iterator[tuple[list[int], Batch, np.ndarray, np.ndarray]]:
    """(indices, batch, logprob [B, T], greedy [B, T]) over all examples; halves what does not fit in memory."""
    for indices, batch in evaluation_batches(examples, micro_tokens):
        waiting = [(list(indices), batch)]
        while waiting:
            rows, part = waiting.pop(0)
            try:
                scores = session.score(part)
            except OutOfMemory as error:
                halves = halve(part)
                if halves is None:
                    raise MemoryExhausted(
                        f"{examples[rows[0]].place}: this row alone does not fit in memory while it is evaluated "
                        f"({error}); lower train.max_length or choose a smaller model"
                    ) from None
                cut = len(halves[0].inputs)
                waiting[:0] = [(rows[:cut], halves[0]), (rows[cut:], halves[1])]
                continue
            yield rows, part, scores.logprob, scores.greedy


def row_losses(
    session: Session, examples: Sequence[Example], micro_tokens: int, report: Report
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each example: summed negative log-likelihood (float64), greedy hits, supervised tokens, and the most
    probable token of all where its answer begins (-1 where that is not scored). [n] each
    """
    loss = np.zeros(len(examples))
    hits = np.zeros(len(examples), dtype=np.int64)
    tokens = np.zeros(len(examples), dtype=np.int64)
    first = np.full(len(examples), -1, dtype=np.int64)
    done = 0
    for rows, batch, logprob, greedy in scored(session, examples, micro_tokens):
        supervised = batch.weights > 0  # [B, T]
        loss[rows] = -(logprob.astype(np.float64) * supervised).sum(axis=1)
        hits[rows] = ((greedy == batch.targets) & supervised).sum(axis=1)
        tokens[rows] = supervised.sum(axis=1)
        begins = np.array([len(examples[i].prompt_tokens) - 1 for i in rows])  # the position that predicts the answer
        each, place = np.arange(len(rows)), begins.clip(0, supervised.shape[1] - 1)
        first[rows] = np.where(supervised[each, place] & (begins == place), greedy[each, place], -1)
        done += len(rows)
        report("loss", done, len(examples))
    return loss, hits, tokens, first


def choose_labels(
    session: Session,
    examples: Sequence[Example],
    label_tokens: Sequence[Sequence[int]],
    micro_tokens: int,
    report: Report = lambda what, done, total: None,
    first: Sequence[int] | np.ndarray | None = None,
) -> list[int]:
    """For each example the index of the label whose tokens are the most probable after its prompt.

    `first` is the most probable token of all after each prompt, where it is known: where every label is a single
    token and `first` is one of them, that label is the choice, and the example need not be run again. [n]
    """
    single = {label[0]: i for i, label in enumerate(label_tokens)} if all(len(x) == 1 for x in label_tokens) else {}
    best = [single.get(int(token), -1) for token in first] if first is not None else [-1] * len(examples)
    open_ones = [i for i, label in enumerate(best) if label < 0]
    candidates = []
    for example in (examples[i] for i in open_ones):
        prompt = example.prompt_tokens
        for label in label_tokens:
            tokens = np.concatenate([prompt, np.asarray(label, dtype=np.int32)])
            weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
            candidates.append(Example(tokens, weights, example.place))
    total = np.zeros(len(candidates))
    done = 0
    for rows, _, logprob, _ in scored(session, candidates, micro_tokens):
        total[rows] = logprob.astype(np.float64).sum(axis=1)
        done += len(rows)
        report("labels", done // max(len(label_tokens), 1), len(open_ones))
    for i, label in zip(open_ones, total.reshape(-1, len(label_tokens)).argmax(axis=1).tolist(), strict=True):
        best[i] = label
    return best


def write_answers(
    session: Session,
    examples: Sequence[Example],
    stop: frozenset[int],
    max_tokens: int,
    decode: Callable[[Sequence[int]], str],
    report: Report,
) -> list[str]:
    """The greedy completion of each example's prompt, as text."""
    answers = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_tokens))
    together, done = GENERATE_TOGETHER, 0
    while done < len(order):
        rows = order[done : done + together]
        try:
            written = session.generate([examples[i].prompt_tokens.tolist() for i in rows], max_tokens, stop)
        except OutOfMemory as error:
            if len(rows) == 1:
                raise MemoryExhausted(f"{examples[rows[0]].place}: no memory to write its answer ({error})") from None
            together = len(rows) // 2
            continue
        for i, tokens in zip(rows, written, strict=True):
            answers[i] = decode(tokens)
        done += len(rows)
        report("answers", done, len(order))
    return answers
