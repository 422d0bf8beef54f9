"""Which rows of a pool to label next: those that a run's model and the words of its rows are least sure of.

The model counts only as sure as it was right on held-out rows: one that has learned nothing yet leaves the choice to
the words. Of the doubtful rows those of every kind are chosen.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from backends.interface import Session
from finetune.check.suspects import rows_judged
from finetune.data.row_words import words
from finetune.data.rows import Example, Prepared
from finetune.evaluation.diverse_rows import choose, margins
from finetune.evaluation.label_confidence import Floats, as_sure_as_right, log_shares
from finetune.evaluation.naive_bayes import WordCounts
from finetune.evaluation.scoring import label_logprobs, row_losses, write_tokens
from finetune.events import Progress
from finetune.recipe.schema import Recipe

ASKED = 40  # times as many rows are put to the model as are chosen: those that the words are least sure of
ASKED_OPEN = 10  # the same where an answer must be written


@dataclass(frozen=True)
class Choice:
    """A row to label."""

    number: int  # in the pool's examples
    answer: str  # the model's own; empty where it has written none
    sure: float  # 0 to 1: of a label, how much likelier it is than the next; of a text, the mean share of its tokens


def new_rows(pool: Sequence[Example], trained: Prepared) -> list[int]:
    """The rows of the pool that say what no row of the run says, and no earlier row of the pool."""
    seen = {_same(example.prompt) for split in trained.splits for example in split.examples}
    found = []
    for i, example in enumerate(pool):
        text = _same(example.prompt)
        if text not in seen:
            seen.add(text)
            found.append(i)
    return found


def _same(text: str) -> str:
    return " ".join(words(text)) or text


def next_rows(
    session: Session, recipe: Recipe, pool: Prepared, trained: Prepared, accuracy: float | None, count: int
) -> Generator[Progress, None, list[Choice]]:
    """`count` rows of `pool.held_out`, or as many as are new, the first the best to begin with.

    session: with the tuned adapter. trained: the run's own rows. accuracy: of that model on held-out rows. Raises
    MemoryExhausted.
    """
    examples = pool.held_out.examples
    new = new_rows(examples, trained)
    known = [example.prompt for example in rows_judged(trained)]
    if pool.task == "classification":
        asked, answers, sure = yield from _labels(session, recipe, pool, trained, accuracy, new, ASKED * count)
    else:
        asked, answers, sure = yield from _open(session, recipe, pool, new, ASKED_OPEN * count)
    picks = choose(sure, [examples[i].prompt for i in asked], known, count)
    return [Choice(asked[i], answers[i], float(sure[i])) for i in picks]


Judged = tuple[list[int], list[str], Floats]  # rows of the pool, the model's answers, how sure they are [n]


def _labels(
    session: Session,
    recipe: Recipe,
    pool: Prepared,
    trained: Prepared,
    accuracy: float | None,
    new: Sequence[int],
    most: int,
) -> Generator[Progress, None, Judged]:
    examples = pool.held_out.examples
    told = words_say(rows_judged(trained), pool.labels, [examples[i] for i in new])
    least = np.sort(np.argsort(margins(told.said), kind="stable")[:most])
    told = replace(told, said=told.said[least])
    asked = [new[i] for i in least]
    tokens = [pool.label_tokens[pool.labels.index(label)] for label in told.labels]
    rows, limit = [examples[i] for i in asked], recipe.train.tokens_at_once
    model = yield from label_logprobs(session, rows, tokens, limit, "pool")
    return asked, [told.labels[i] for i in model.argmax(axis=1)], told.margins_with(model, accuracy)


@dataclass(frozen=True)
class WordsSay:
    """What the words of rows with labels say of other rows."""

    labels: list[str]  # that a row has
    said: Floats  # shares as logarithms, as sure as right. [n, k]
    right: float  # share of the rows with labels that the words of the others label right
    surest: float  # so sure may an opinion be: all right on few rows is no proof of more, and no doubt leaves no choice

    def margins_with(self, model: Floats, accuracy: float | None) -> Floats:
        """How sure the words and a model are together. model: the log-probability of each label. [n, k] -> [n]"""
        right = self.right if accuracy is None else min(accuracy, self.surest)
        return margins(as_sure_as_right(log_shares(model), right) + self.said)


def words_say(given: Sequence[Example], labels: Sequence[str], rows: Sequence[Example]) -> WordsSay:
    counts, surest = WordCounts(given, labels), 1 - 1 / (len(given) + 2)
    right = min(float((counts.without_itself().argmax(axis=1) == counts.truth).mean()), surest)
    said = as_sure_as_right(counts.logprobs(rows).reshape(-1, len(counts.labels)), right)
    return WordsSay(counts.labels, said, right, surest)


def _open(
    session: Session, recipe: Recipe, pool: Prepared, new: Sequence[int], most: int
) -> Generator[Progress, None, Judged]:
    """By how probable the model's own answer is to it. Of many rows only some are asked, drawn with the seed."""
    drawn = np.random.default_rng(recipe.seed).permutation(len(new))[:most]
    asked = [new[i] for i in np.sort(drawn)]
    rows = [pool.held_out.examples[i] for i in asked]
    written = yield from write_tokens(session, rows, pool.stop_tokens, recipe.evaluate.max_tokens, "pool")
    answered = [_with(row, answer) for row, answer in zip(rows, written, strict=True)]
    losses = yield from row_losses(session, answered, recipe.train.tokens_at_once, "pool: answers")
    return asked, [""] * len(asked), np.exp(-losses.loss / np.maximum(losses.tokens, 1))


def _with(row: Example, answer: Sequence[int]) -> Example:
    """The row with the model's own answer, of one token at least, as what is supervised."""
    prompt = row.prompt_tokens
    tokens = np.array([*prompt, *(answer or row.tokens[len(prompt) : len(prompt) + 1])], np.int32)
    weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
    return replace(row, tokens=tokens, weights=weights, answer_start=len(prompt), answer_end=None)
