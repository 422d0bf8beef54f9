"""One model measured on held-out rows, token by token too: what an export is compared by with the run's own model."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.interface import PROMPTS_TOGETHER, Batch, Reader, Scores
from finetune.data.collate import evaluation_batches
from finetune.data.rows import Example, Message, Split
from finetune.data.tokenizer import answer_text
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.intervals import ratio_interval
from finetune.evaluation.scoring import scored
from finetune.events import Progress
from finetune.training.job import Job

ANSWERED = 20  # rows whose answers are written
LABEL_TOKENS = 8  # in an answer that is a label, beside those of the longest label


class Exported(Protocol):
    """An export as a program loads it: a session of its own, and the ways from texts to tokens."""

    @property
    def session(self) -> Reader: ...

    @property
    def stops(self) -> Collection[int]:
        """The tokens that end an answer, as the export itself says."""

    def tokenise(self, text: str) -> list[int]:
        """The tokens of a text; special tokens in it are read as such, and none is added."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """What the model is given of a conversation by programs that know the export alone.

        Raises ValueError where the template refuses it.
        """


@dataclass(frozen=True)
class Measured:
    """One model on the rows. n is their number."""

    evaluation: Evaluation
    logprobs: tuple[NDArray[np.float32], ...]  # [n] of each row's supervised tokens
    greedy: tuple[NDArray[np.int32], ...]  # [n] the most probable token at each of them
    answers: tuple[tuple[int, ...], ...]  # of the first rows, without the token that ended each
    ended: tuple[bool, ...]  # whether one did


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
            decode=lambda tokens: answer_text(job.tokenizer, tokens, job.prepared.stop_tokens),
            compared=asked.answer,
        )
    )


def measured(
    session: Reader, job: Job, split: Split, name: str, stops: Collection[int]
) -> Generator[Progress, None, Measured]:
    """The rows under one model. `stops`: what ends its answers. `name` says in the progress what is measured."""
    remembering = _Remembering(session)
    logprobs, greedy = yield from _tokens(remembering, job, split.examples, f"{name}: tokens")
    evaluation = yield from evaluated(remembering, job, split, name, stops)
    answers = yield from _answers(session, job, split.examples[:ANSWERED], f"{name}: answers", stops)
    most = longest_answer(job)
    written = tuple(tuple(answer) for answer in answers)
    return Measured(evaluation, logprobs, greedy, written, tuple(len(answer) < most for answer in written))


def _tokens(
    session: Reader, job: Job, examples: Sequence[Example], what: str
) -> Generator[Progress, None, tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.int32], ...]]]:
    logprobs: list[Any] = [None] * len(examples)
    greedy: list[Any] = [None] * len(examples)
    done = 0
    batches = evaluation_batches(examples, job.recipe.train.tokens_at_once, session.shares_prefixes)
    for rows, batch, logprob, best in scored(session, batches, examples):
        for at, row in enumerate(rows):
            supervised = batch.weights[at] > 0
            logprobs[row], greedy[row] = logprob[at][supervised], best[at][supervised]
        done += len(rows)
        yield Progress(0, what, done, len(examples))
    return tuple(logprobs), tuple(greedy)


def longest_answer(job: Job) -> int:
    """How many tokens an answer may have."""
    if job.prepared.task == "classification":
        return max(map(len, job.prepared.label_tokens)) + LABEL_TOKENS
    return job.recipe.evaluate.max_tokens


def _answers(
    session: Reader, job: Job, examples: Sequence[Example], what: str, stops: Collection[int]
) -> Generator[Progress, None, list[list[int]]]:
    """What the model writes, greedily, until a token of `stops`; nothing where the rows are plain text."""
    answers: list[list[int]] = []
    if job.prepared.task == "text":
        return answers
    for start in range(0, len(examples), PROMPTS_TOGETHER):
        prompts = [example.prompt_tokens.tolist() for example in examples[start : start + PROMPTS_TOGETHER]]
        answers += session.generate(prompts, longest_answer(job), stops)
        yield Progress(0, what, len(answers), len(examples))
    return answers


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
