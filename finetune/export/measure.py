"""One model measured on held-out rows, token by token too: what an export is compared by with the run's own model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch, Reader, Scores
from finetune.data.collate import evaluation_batches
from finetune.data.rows import Message, Split
from finetune.data.tokenizer import answer_text
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.intervals import ratio_interval
from finetune.evaluation.scoring import Written, scored, write_answers
from finetune.events import Progress
from finetune.training.job import Job

ANSWERED = 20  # rows whose answers are written
LABEL_TOKENS = 8  # in an answer that is a label, beside those of the longest label


@dataclass(frozen=True)
class Exported:
    """An export as a program loads it: a session of its own, and the ways from texts to tokens."""

    session: Reader
    stops: Collection[int]  # tokens that end an answer, as the export says; none where its program does it by itself
    tokenise: Callable[[str], list[int]]  # special tokens in a text are read as such, and none is added
    # What programs that know the export alone give to the model of a conversation and tools. Raises ValueError where
    # the template refuses it.
    prompt: Callable[[Sequence[Message], Sequence[Any]], list[int]]


@dataclass(frozen=True)
class Measured:
    """One model on the rows. n is their number."""

    evaluation: Evaluation
    logprobs: tuple[NDArray[np.float32], ...]  # [n] of each row's supervised tokens
    greedy: tuple[NDArray[np.int32], ...]  # [n] the most probable token at each of them
    answers: tuple[Written, ...]  # of the first rows; none where they are plain text


class _Remembering:
    """A reader that scores each batch once: rows are scored for their tokens and again for their loss."""

    def __init__(self, inner: Reader) -> None:
        self._inner, self._known = inner, dict[bytes, Scores]()
        self.shares_prefixes, self.generate = inner.shares_prefixes, inner.generate

    def score(self, batch: Batch) -> Scores:
        parts = (batch.inputs, batch.targets, batch.weights, *batch.prefixes)
        key = b"|".join(part.tobytes() for part in parts)
        if key not in self._known:
            self._known[key] = self._inner.score(batch)
        return self._known[key]


def chosen(split: Split, rows: int) -> Split:
    """So many of the split's rows, at equal distances."""
    count = len(split.examples)
    places = np.linspace(0, max(count - 1, 0), min(rows, count)).round().astype(int)
    return replace(split, examples=tuple(split.examples[at] for at in places))


def evaluated(
    session: Reader, job: Job, split: Split, name: str, stops: Collection[int]
) -> Generator[Progress, None, Evaluation]:
    """The rows measured as the run measures its held-out rows, with answers that end at `stops`."""
    asked = job.recipe.evaluate
    return (
        yield from evaluate(
            session,
            replace(job.prepared, stop_tokens=frozenset(stops)),
            split,
            name=name,
            micro_tokens=job.recipe.train.tokens_at_once,
            max_tokens=asked.max_tokens if asked.generate else 0,
            decode=_decode(job),
            compared=asked.answer,
        )
    )


def measured(
    session: Reader, job: Job, split: Split, name: str, stops: Collection[int]
) -> Generator[Progress, None, Measured]:
    """The rows under one model. `stops`: what ends its answers. `name` says in the progress what is measured."""
    reader, examples = _Remembering(session), split.examples
    logprobs, greedy = [np.empty(0, np.float32)] * len(examples), [np.empty(0, np.int32)] * len(examples)
    done = 0
    batches = evaluation_batches(examples, job.recipe.train.tokens_at_once, reader.shares_prefixes)
    for rows, batch, logprob, best in scored(reader, batches, examples):
        for row, supervised, *found in zip(rows, batch.weights > 0, logprob, best, strict=True):
            logprobs[row], greedy[row] = (one[supervised] for one in found)
        done += len(rows)
        yield Progress(0, f"{name}: tokens", done, len(examples))
    evaluation = yield from evaluated(reader, job, split, name, stops)
    answers: list[Written] = []
    if job.prepared.task != "text":
        first, most, what = examples[:ANSWERED], longest_answer(job), f"{name}: answers"
        answers = yield from write_answers(reader, first, frozenset(stops), most, _decode(job), what)
    return Measured(evaluation, tuple(logprobs), tuple(greedy), tuple(answers))


def _decode(job: Job) -> Callable[[Sequence[int]], str]:
    return partial(answer_text, job.tokenizer, stop=job.prepared.stop_tokens)


def longest_answer(job: Job) -> int:
    """How many tokens an answer may have."""
    if job.prepared.task == "classification":
        return max(map(len, job.prepared.label_tokens)) + LABEL_TOKENS
    return job.recipe.evaluate.max_tokens


@dataclass(frozen=True)
class Kept:
    """The share of the tuning that an export keeps: (base - export) / (base - tuned), in loss on the same rows."""

    share: float
    interval: tuple[float, float]  # 95 %


def share_kept(base: Evaluation, tuned: Evaluation, export: Evaluation) -> Kept | None:
    """None where training changed the loss of these rows too little to say."""
    rows = list(zip(base.results, tuned.results, export.results, strict=True))
    gains = [(before.loss - after.loss) * after.tokens for before, after, _ in rows]
    parts = [(before.loss - now.loss) * now.tokens for before, _, now in rows]
    interval = ratio_interval(parts, gains)
    return None if interval is None else Kept(sum(parts) / sum(gains), interval)
