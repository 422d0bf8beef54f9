"""Forgetting: loss on general text and on the base's own answers, before and after, with an interval."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from backends.interface import IntArray, Session
from finetune.data.rows import Example
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode, with_begin
from finetune.evaluation.evaluate import Evaluation, base_weights
from finetune.evaluation.intervals import standard_error, weighted_mean_interval
from finetune.evaluation.scoring import RowLosses, row_losses, write_tokens
from finetune.events import Progress

FILE = "general.jsonl"  # 200 short pieces of our own writing, of five kinds in turn
LONGEST = 64  # tokens of a piece; what lies beyond is not read
MOST_ANSWERED, FEWEST_ANSWERED = 32, 10  # pieces that the base goes on with itself; fewer tell nothing
ANSWERED = 16  # tokens of a greedy answer to the first half of a piece
FEWEST = 20  # pieces, to say anything
MARGIN = 0.1  # nats per token: a smaller rise is of no account
SIGNIFICANT = 0.01  # p-values below this, of a rise beyond the margin
READING, ANSWERS = "errors: general text, {}", "errors: its own answers, {}"  # in the progress: of which model
WRITING = "errors: its own answers, writing"
Verdict = Literal["forgot", "some", "none", "too short to say"]


@dataclass(frozen=True)
class GeneralText:
    """Pieces of text that are not of the recipe's data."""

    kinds: Sequence[str] = ()  # of each piece
    examples: Sequence[Example] = ()
    answered: int = 0  # of them, that the base goes on with itself

    @property
    def halves(self) -> list[Example]:
        """The first half of each of those."""
        some = self.examples[: self.answered]
        return [replace(example, answer_start=max(len(example) // 2, 1)) for example in some]


@dataclass(frozen=True)
class Change:
    """Of the loss on the same pieces, in nats per token: above 0 where the tuned model does worse."""

    name: str  # all, answers (the base's own greedy ones), or the kind: encyclopaedic, dialogue, code, ...
    pieces: int
    base: float  # nats per token
    tuned: float
    change: float
    interval: tuple[float, float]  # of the change, 95 %


@dataclass(frozen=True)
class Forgetting:
    """The kept adapter against the base on general text that is not of the recipe's data."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    verdict: Verdict  # some: beyond the margin, and yet less than was gained on the held-out rows
    changes: tuple[Change, ...]  # none where the run was too short; else "all" first, then by kind, "answers" last
    margin: float  # nats per token: a smaller rise is of no account
    p_value: float | None  # of "it rises by no more than the margin", one-sided
    p_more: float | None  # of "it rises by no more than the loss on the held-out rows fell"; None without a base
    gain: float | None  # by how much the loss on the held-out rows fell, nats per token; None without a base
    message: str  # a plain sentence


def measuring(
    session: Session, general: GeneralText, stop: frozenset[int], micro_tokens: int
) -> Generator[Progress, None, tuple[Change, ...]]:
    """Both models on these pieces. Nothing where there are none. Raises MemoryExhausted."""
    examples = general.examples
    if not examples:
        return ()
    with base_weights(session):
        before = yield from row_losses(session, examples, micro_tokens, READING.format("base model"))
        answers = yield from _answers(session, general.halves, stop)
        own = yield from row_losses(session, answers, micro_tokens, ANSWERS.format("base model"))
    after = yield from row_losses(session, examples, micro_tokens, READING.format("tuned model"))
    named = {"all": list(range(len(examples)))}
    for number, kind in enumerate(general.kinds):
        named.setdefault(kind, []).append(number)
    changes = [change_of(name, before, after, rows) for name, rows in named.items()]
    if answers:
        tuned = yield from row_losses(session, answers, micro_tokens, ANSWERS.format("tuned model"))
        changes.append(change_of("answers", own, tuned, range(len(answers))))
    return tuple(changes)


def general_text(tokenizer: Tokenizer, most: int, vocabulary: int | None) -> GeneralText:
    """As many pieces as `most` tokens allow; the kinds take turns. None where they are too few.

    vocabulary: pieces with a token beyond it are left out.
    """
    whole = pieces(tokenizer, vocabulary)
    lengths = np.array([len(example) for example in whole.examples])
    count = _affordable(2.4 * lengths + ANSWERED, most)  # both models read it; a quarter of them is gone on with too
    if count < 4 * FEWEST_ANSWERED:
        count = min(_affordable(2.0 * lengths, most), 4 * FEWEST_ANSWERED - 1)
    if count < FEWEST:
        return GeneralText()
    answered = min(MOST_ANSWERED, count // 4) if count >= 4 * FEWEST_ANSWERED else 0
    return GeneralText(whole.kinds[:count], whole.examples[:count], answered)


def pieces(tokenizer: Tokenizer, vocabulary: int | None) -> GeneralText:
    file = resources.files("finetune") / "assets" / FILE
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    begin = begin_tokens(tokenizer)
    kinds, examples = [], []
    for row, encoded in zip(rows, encode(tokenizer, [row["text"] for row in rows]), strict=True):
        tokens = np.array(with_begin(encoded.tokens, begin)[:LONGEST], np.int32)
        if len(tokens) > 2 * len(begin) + 2 and (vocabulary is None or int(np.max(tokens)) < vocabulary):
            kinds.append(row["kind"])
            examples.append(_example(tokens, max(len(begin), 1), f"{FILE}:{len(kinds)}"))
    return GeneralText(kinds, examples)


def _example(tokens: IntArray, start: int, location: str) -> Example:
    """Supervised from token `start` on."""
    return Example(tokens, (np.arange(len(tokens)) >= start).astype(np.float32), location)


def _affordable(each: NDArray[np.float64], most: int) -> int:
    """How many of the first pieces, of so many tokens each, together have no more than `most`."""
    return int(np.count_nonzero(np.cumsum(each) <= most))


def _answers(
    session: Session, halves: Sequence[Example], stop: frozenset[int]
) -> Generator[Progress, None, list[Example]]:
    """How the model itself goes on from each; those that end at once are left out."""
    written = yield from write_tokens(session, halves, stop, ANSWERED, WRITING)
    return [
        _example(np.array([*half.prompt_tokens, *tokens], np.int32), len(half.prompt_tokens), half.location)
        for half, tokens in zip(halves, written, strict=True)
        if tokens
    ]


def change_of(name: str, before: RowLosses, after: RowLosses, rows: Sequence[int]) -> Change:
    """Of those rows; each row's tokens belong together."""
    chosen = np.array(rows)
    tokens = before.tokens[chosen]
    base, tuned = (float(one.loss[chosen].sum() / tokens.sum()) for one in (before, after))
    each = (after.loss[chosen] - before.loss[chosen]) / tokens
    low, high = weighted_mean_interval(each, tokens) if len(chosen) > 1 else (tuned - base, tuned - base)
    return Change(name, len(chosen), base, tuned, tuned - base, (low, high))


def judge(changes: Sequence[Change], base: Evaluation | None, tuned: Evaluation) -> Forgetting:
    """The verdict and its sentence. base, tuned: on the held-out rows."""
    fall = None if base is None else _fall(base, tuned)
    gain = None if fall is None else fall.change
    if not changes:
        return Forgetting("too short to say", (), MARGIN, None, None, gain, _TOO_SHORT)
    rise = changes[0]
    p_value = beyond(rise, MARGIN)
    p_more = None if fall is None else beyond(rise, fall.change, standard_error(fall.interval))
    verdict: Verdict = "none" if p_value >= SIGNIFICANT else "forgot"
    if verdict == "forgot" and p_more is not None and p_more >= SIGNIFICANT:
        verdict = "some"
    message = _sentence(verdict, changes, gain)
    return Forgetting(verdict, tuple(changes), MARGIN, p_value, p_more, gain, message)


def _fall(base: Evaluation, tuned: Evaluation) -> Change:
    """By how much the loss on the held-out rows falls: here a fall is above 0."""
    differences = [before.loss - after.loss for before, after in zip(base.results, tuned.results, strict=True)]
    gain = base.loss - tuned.loss
    known = (
        weighted_mean_interval(differences, [row.tokens for row in tuned.results]) if tuned.rows > 1 else (gain, gain)
    )
    return Change("held-out rows", tuned.rows, base.loss, tuned.loss, gain, known)


def beyond(change: Change, limit: float, error: float = 0.0) -> float:
    """The one-sided p-value of "it rises by no more than the limit", which has a standard error of its own."""
    whole = math.hypot(standard_error(change.interval), error)
    return float(change.change <= limit) if whole == 0 else 1 - NormalDist().cdf((change.change - limit) / whole)


_TOO_SHORT = (
    f"Forgetting: not measured; {FEWEST} pieces of general text would cost too large a share of so short a run."
)
_SAID: dict[Verdict, str] = {
    "none": "No forgetting to speak of",
    "some": "It forgot less than it gained",
    "forgot": "Forgot",
}


def _sentence(verdict: Verdict, changes: Sequence[Change], gain: float | None) -> str:
    whole, kinds = changes[0], [change for change in changes[1:] if change.name != "answers"]
    low, high = whole.interval
    worst = max(kinds, key=lambda change: change.change)
    most = "" if verdict == "none" else f"; most on {worst.name}: {worst.change:+.3f}"
    gained = "" if gain is None else f"; on the held-out rows the loss falls by {gain:.3f}"
    remedy = " Lower train.learning_rate or train.epochs, or mix general rows into the data."
    return (
        f"{_SAID[verdict]}: loss on {whole.pieces} pieces of general text {whole.base:.3f} before, {whole.tuned:.3f} "
        f"after (95 % interval of the change: {low:+.3f} to {high:+.3f} nats per token{most}){gained}."
        f"{remedy if verdict == 'forgot' else ''}"
    )
