"""What evaluation asks of a session: losses, labels and answers of many rows, in batches that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from backends.interface import PROMPTS_TOGETHER, Batch, OutOfMemory, Session
from finetune.data.collate import evaluation_batches, halve, label_batches
from finetune.data.rows import Example
from finetune.errors import MemoryExhausted
from finetune.events import Report

Scored = tuple[list[int], Batch, np.ndarray, np.ndarray]  # row numbers, batch, logprob [B, T], greedy [B, T]


def scored(
    session: Session, batches: Iterable[tuple[list[int], Batch]], place: Callable[[int], str]
) -> Iterator[Scored]:
    """The scores of every batch; halves what does not fit in memory. `place` says where a row comes from."""
    for rows, batch in batches:
        waiting = [(rows, batch)]
        while waiting:
            rows, part = waiting.pop(0)
            try:
                scores = session.score(part)
            except OutOfMemory as error:
                halves = halve(part)
                if halves is None:
                    raise MemoryExhausted(
                        f"{place(rows[0])}: this row alone does not fit in memory while it is evaluated "
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
    batches = evaluation_batches(examples, micro_tokens, session.shares_prefixes)
    for rows, batch, logprob, greedy in scored(session, batches, lambda row: examples[row].place):
        supervised = batch.weights > 0  # [B, T]
        loss[rows] = -(logprob.astype(np.float64) * supervised).sum(axis=1)
        hits[rows] = ((greedy == batch.targets) & supervised).sum(axis=1)
        tokens[rows] = supervised.sum(axis=1)
        before = len(batch.prefixes[0]) if batch.prefixes else 0
        begins = np.array([len(examples[i].prompt_tokens) - 1 - before for i in rows])  # what predicts the answer
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
    open_ones = [examples[i] for i, label in enumerate(best) if label < 0]
    labels = len(label_tokens)
    batches = label_batches(
        [one.prompt_tokens for one in open_ones], label_tokens, micro_tokens, session.shares_prefixes
    )
    total = np.zeros(len(open_ones) * labels)
    done = 0
    for rows, _, logprob, _ in scored(session, batches, lambda row: open_ones[row // labels].place):
        total[rows] = logprob.astype(np.float64).sum(axis=1)
        done += len(rows)
        report("labels", done // labels, len(open_ones))
    chosen = iter(total.reshape(-1, labels).argmax(axis=1).tolist())
    return [next(chosen) if label < 0 else label for label in best]


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
    together, done = PROMPTS_TOGETHER, 0
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
