"""Measures a model on held-out rows, token by token, to compare an export with the run's model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from backends.interface import FloatArray, IntArray, Reader, Session
from finetune.data.rows import Message, Split
from finetune.data.tokenizer import answer_text
from finetune.disk.adapter import Adapter
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.intervals import ratio_interval
from finetune.evaluation.scoring import Written, row_losses, write_answers
from finetune.events import Progress
from finetune.export.prompt import Prompts
from finetune.training.job import Job

ANSWERED = 20  # rows whose answers are written
LABEL_TOKENS = 8  # in an answer that is a label, beside those of the longest label


@dataclass(frozen=True)
class Making:
    """What every export is made from: a run's model, loaded, and its prompt as a chat template."""

    job: Job
    session: Session  # with the adapter in it
    adapter: Adapter
    prompts: Prompts
    template: str  # them as one chat template


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
    """One model on the rows."""

    evaluation: Evaluation
    tokens: Sequence[tuple[FloatArray, IntArray]]  # of each row's supervised ones: logprob, the most probable token
    answers: Sequence[Written]  # of the first rows; none where they are plain text


def chosen(split: Split, rows: int) -> Split:
    """So many of the split's rows, at equal distances."""
    count = len(split.examples)
    places = np.linspace(0, max(count - 1, 0), min(rows, count)).round().astype(int)
    return replace(split, examples=tuple(split.examples[at] for at in places))


def measured(
    session: Reader, job: Job, split: Split, name: str, stops: Collection[int], answered: int = ANSWERED
) -> Generator[Progress, None, Measured]:
    """The rows under one model. stops: what ends its answers. name: says in the progress what is measured. answered:
    how many of the rows.
    """
    asked, at_once = job.recipe.evaluate, job.recipe.train.tokens_at_once
    decode = partial(answer_text, job.tokenizer, stop=job.prepared.stop_tokens)
    losses = yield from row_losses(session, split.examples, at_once, f"{name}: tokens")
    evaluation = yield from evaluate(
        session,
        replace(job.prepared, stop_tokens=frozenset(stops)),
        split,
        name=name,
        micro_tokens=at_once,
        max_tokens=asked.max_tokens if asked.generate else 0,
        decode=decode,
        compared=asked.answer,
        losses=losses,
    )
    first, most = split.examples[: answered if job.prepared.task != "text" else 0], longest_answer(job)
    answers = yield from write_answers(session, first, frozenset(stops), most, decode, f"{name}: answers")
    return Measured(evaluation, losses.scores, answers)


def longest_answer(job: Job) -> int:
    """How many tokens an answer may have."""
    if job.prepared.task == "classification":
        return max(map(len, job.prepared.label_tokens)) + LABEL_TOKENS
    return job.recipe.evaluate.max_tokens


def share_kept(base: Evaluation, tuned: Evaluation, export: Evaluation) -> tuple[float, float, float] | None:
    """The share of the tuning that an export keeps, (base - export) / (base - tuned) in loss on the same rows, and its
    95 % interval; None where training changed the loss of these rows too little to say.
    """
    rows = list(zip(base.results, tuned.results, export.results, strict=True))
    gains = [(before.loss - after.loss) * after.tokens for before, after, _ in rows]
    parts = [(before.loss - now.loss) * now.tokens for before, _, now in rows]
    interval = ratio_interval(parts, gains)
    return None if interval is None else (sum(parts) / sum(gains), *interval)
