"""Losses, label scores and answers of many rows, in batches that fit in memory.

Each function is a generator that yields its progress and returns its result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.interface import PROMPTS_TOGETHER, Batch, FloatArray, IntArray, OutOfMemory, Reader, Session
from backends.process_group import generate_all, score_all, side_by_side
from finetune.data.collate import evaluation_batches, halve, label_batches
from finetune.data.rows import Example
from finetune.errors import MemoryExhausted
from finetune.evaluation.read_ahead import ahead
from finetune.events import Progress

ScoredBatch = tuple[list[int], Batch, FloatArray, IntArray]  # row numbers, batch, logprob [B, T], greedy [B, T]


class RowLosses(NamedTuple):
    """Of each example, [n] each."""

    loss: NDArray[np.float64]  # negative log-likelihood, summed over the supervised tokens
    correct: NDArray[np.int64]  # supervised tokens that are the most probable ones
    tokens: NDArray[np.int64]  # supervised
    first: NDArray[np.int64]  # the most probable token of all where the answer begins; -1 where that is not scored
    scores: Sequence[tuple[FloatArray, IntArray]] = ()  # of each supervised token: its logprob, the most probable one


class Written(NamedTuple):
    """An answer that a model has written."""

    text: str
    ended: bool  # by itself, and not by the limit of tokens


def scored(
    session: Reader, batches: Iterable[tuple[list[int], Batch]], examples: Sequence[Example], per_example: int = 1
) -> Iterator[ScoredBatch]:
    """The scores of every batch; a batch that does not fit in memory is halved.

    Row i of the batches belongs to example i // per_example. Raises MemoryExhausted, which names the example, when a
    single row does not fit.
    """
    to_come, waiting = iter(batches), deque[tuple[list[int], Batch]]()
    while True:
        waiting.extend(islice(to_come, max(side_by_side(session) - len(waiting), 0)))
        now = [waiting.popleft() for _ in range(min(side_by_side(session), len(waiting)))]
        if not now:
            return
        halved: list[tuple[list[int], Batch]] = []
        for (rows, part), scores in zip(now, score_all(session, [part for _, part in now]), strict=True):
            if not isinstance(scores, OutOfMemory):
                yield rows, part, scores.logprob, scores.greedy
                continue
            halved += _halves(rows, part, examples[rows[0] // per_example], scores)
        waiting.extendleft(reversed(halved))


def row_states(
    session: Session, examples: Sequence[Example], micro_tokens: int, what: str
) -> Generator[Progress, None, FloatArray]:
    """What a head is given for each example. [n, D] Raises MemoryExhausted, which names the example."""
    yield from ahead(session, evaluation_batches(examples, micro_tokens, session.shares_prefixes))
    waiting = deque(evaluation_batches(examples, micro_tokens, session.shares_prefixes))
    states: dict[int, FloatArray] = {}
    while waiting:
        rows, part = waiting.popleft()
        try:
            found = session.states(part)
        except OutOfMemory as error:
            waiting.extendleft(reversed(_halves(rows, part, examples[rows[0]], error)))
            continue
        states |= zip(rows, found, strict=True)
        yield Progress(0, what, len(states), len(examples))
    return np.stack([states[row] for row in range(len(examples))])


def _halves(rows: list[int], part: Batch, first: Example, error: OutOfMemory) -> list[tuple[list[int], Batch]]:
    """Of a batch that does not fit in memory. Raises MemoryExhausted where it is `first` alone."""
    halves = halve(part)
    if halves is None:
        raise MemoryExhausted(
            f"{first.location}: this row alone does not fit in memory during evaluation ({error}); lower "
            "train.max_length or choose a smaller model"
        ) from None
    cut = len(halves[0].inputs)
    return [(rows[:cut], halves[0]), (rows[cut:], halves[1])]


def row_losses(
    session: Reader, examples: Sequence[Example], micro_tokens: int, what: str = "loss"
) -> Generator[Progress, None, RowLosses]:
    """The loss of each example. `what` names the progress."""
    n = len(examples)
    losses = RowLosses(np.zeros(n), np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, -1, np.int64))
    scores = [(np.empty(0, np.float32), np.empty(0, np.int32))] * n
    done = 0
    yield from ahead(session, evaluation_batches(examples, micro_tokens, session.shares_prefixes))
    batches = evaluation_batches(examples, micro_tokens, session.shares_prefixes)
    for rows, batch, logprob, greedy in scored(session, batches, examples):
        supervised = batch.weights > 0  # [B, T]
        losses.loss[rows] = -(logprob.astype(np.float64) * supervised).sum(axis=1)
        losses.correct[rows] = ((greedy == batch.targets) & supervised).sum(axis=1)
        losses.tokens[rows] = supervised.sum(axis=1)
        for i, at, *per_row in zip(rows, supervised, logprob, greedy, strict=True):
            scores[i] = per_row[0][at], per_row[1][at]
        before = len(batch.prefixes[0]) if batch.prefixes else 0
        begins = np.array([len(examples[i].prompt_tokens) - 1 - before for i in rows])  # predicts the answer's first
        row, column = np.arange(len(rows)), begins.clip(0, supervised.shape[1] - 1)
        losses.first[rows] = np.where(supervised[row, column] & (begins == column), greedy[row, column], -1)
        done += len(rows)
        yield Progress(0, what, done, n)
    return losses._replace(scores=scores)


def choose_labels(
    session: Reader,
    examples: Sequence[Example],
    label_tokens: Sequence[Sequence[int]],
    micro_tokens: int,
    first: Sequence[int] | NDArray[np.int64] | None = None,
    what: str = "labels",
) -> Generator[Progress, None, list[int]]:
    """For each example the index of the label whose tokens are the most probable after its prompt.

    `first` is the most probable token of all after each prompt, where it is known: where every label is a single
    token and `first` is one of them, that label is the choice, and the example need not be scored again. [n]
    """
    single = {label[0]: i for i, label in enumerate(label_tokens)} if all(len(x) == 1 for x in label_tokens) else {}
    best = [single.get(int(token), -1) for token in first] if first is not None else [-1] * len(examples)
    undecided = [example for example, label in zip(examples, best, strict=True) if label < 0]
    logprobs = yield from label_logprobs(session, undecided, label_tokens, micro_tokens, what)
    chosen = iter(logprobs.argmax(axis=1).tolist())
    return [next(chosen) if label < 0 else label for label in best]


def label_logprobs(
    session: Reader,
    examples: Sequence[Example],
    label_tokens: Sequence[Sequence[int]],
    micro_tokens: int,
    what: str = "labels",
) -> Generator[Progress, None, NDArray[np.float64]]:
    """The log-probability of each label's tokens after each prompt. [n, labels]"""
    labels = len(label_tokens)
    prompts = [example.prompt_tokens for example in examples]
    yield from ahead(session, label_batches(prompts, label_tokens, micro_tokens, session.shares_prefixes))
    batches = label_batches(prompts, label_tokens, micro_tokens, session.shares_prefixes)
    total = np.zeros(len(examples) * labels)
    done = 0
    for rows, _, logprob, _ in scored(session, batches, examples, labels):
        total[rows] = logprob.astype(np.float64).sum(axis=1)
        done += len(rows)
        yield Progress(0, what, done // labels, len(examples))
    return total.reshape(-1, labels)


def write_answers(
    session: Reader,
    examples: Sequence[Example],
    stop: frozenset[int],
    max_tokens: int,
    decode: Callable[[Sequence[int]], str],
    what: str = "answers",
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[Progress, None, list[Written]]:
    """The completion of each example's prompt, as text; greedy at temperature 0.

    Raises MemoryExhausted, which names the example.
    """
    tokens = yield from write_tokens(session, examples, stop, max_tokens, what, temperature, seed)
    return [Written(decode(answer), len(answer) < max_tokens) for answer in tokens]


def write_tokens(
    session: Reader,
    examples: Sequence[Example],
    stop: frozenset[int],
    max_tokens: int,
    what: str = "answers",
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[Progress, None, list[list[int]]]:
    """The same as tokens, without the one that ends each."""
    answers: list[list[int]] = [[]] * len(examples)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_tokens))
    together, done = PROMPTS_TOGETHER, 0
    while done < len(by_length):
        starts = range(done, len(by_length), together)[: side_by_side(session)]
        groups = [by_length[start : start + together] for start in starts]
        prompts = [[examples[i].prompt_tokens.tolist() for i in rows] for rows in groups]
        seeds = [seed + start for start in starts]
        for rows, written in zip(
            groups, generate_all(session, prompts, max_tokens, stop, temperature, seeds), strict=True
        ):
            if isinstance(written, OutOfMemory):
                if len(rows) == 1:
                    message = f"{examples[rows[0]].location}: not enough memory to write its answer ({written})"
                    raise MemoryExhausted(f"{message}; lower evaluate.max_tokens or choose a smaller model") from None
                together = len(rows) // 2
                break
            for i, tokens in zip(rows, written, strict=True):
                answers[i] = tokens
            done += len(rows)
            yield Progress(0, what, done, len(by_length))
    return answers
