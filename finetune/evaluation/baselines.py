"""Baselines that a model must beat: majority class, chance, naive Bayes; and labels it never predicts."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from finetune.data.rows import Example, Prepared
from finetune.disk.atomic import write_file
from finetune.disk.identity import split_digest
from finetune.disk.run_files import read_json
from finetune.evaluation.naive_bayes import WordCounts
from finetune.text import harmless, shorten

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Evaluation

MOST_ROWS = 5_000  # of each side, drawn at random; more take longer than they help
_NAMED = 5  # labels


@dataclass(frozen=True)
class Words:
    """Naive Bayes on the words of the training rows, measured on held-out rows; and as it stands in words.json."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    accuracy: float
    measured: int  # held-out rows
    seconds: float
    rows: str  # a digest of the training rows and the held-out ones

    @property
    def cost(self) -> str:
        return f"naive Bayes on the words: {self.measured:,} rows in {self.seconds:.1f} s (words.json)"


def bag_of_words(prepared: Prepared, file: Path | None = None) -> Words | None:
    """None where there are no labels, or no training rows and nothing kept of them.

    At most 5,000 rows of each side, and of each 10,000 characters: about a second.
    file: where it is kept, and taken from where the rows are the same. Raises Incompatible for what no run writes.
    """
    train, held_out = prepared.train.examples, prepared.held_out.examples
    if len(prepared.labels) < 2 or not held_out:
        return None
    measured = split_digest(prepared.held_out)
    rows = f"{split_digest(prepared.train)} {measured}"
    saved = read_json(file, Words, "delete it, and it is measured again") if file else None
    if saved and (saved.rows == rows or (not train and saved.rows.endswith(f" {measured}"))):
        return saved
    if not train:
        return None
    began = time.perf_counter()
    asked = _drawn(held_out)
    chosen = guess_by_words(_drawn(train), asked, prepared.labels)
    right = sum(guess == row.answer for guess, row in zip(chosen, asked, strict=True))
    words = Words(right / len(asked), len(asked), round(time.perf_counter() - began, 3), rows)
    if file:
        write_file(file, json.dumps(asdict(words), indent=2) + "\n")
    return words


def _drawn(rows: Sequence[Example]) -> Sequence[Example]:
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[row] for row in np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS]]


def guess_by_words(train: Sequence[Example], asked: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """The label that naive Bayes on the words of `train` gives to each of `asked`."""
    counts = WordCounts(train, labels)
    return [counts.labels[label] for label in counts.logprobs(asked).argmax(axis=1).tolist()]


def majority(evaluation: Evaluation) -> tuple[str, float] | None:
    """The most frequent expected answer of the rows, and the share right of a model that always gives it."""
    expected = Counter(row.judged[0] for row in evaluation.results if row.correct is not None)
    expected.pop(None, None)
    if len(expected) < 2:  # where all expect the same, a constant answer is no yardstick
        return None
    answer, count = expected.most_common(1)[0]
    return str(answer), count / sum(expected.values())


def clearly_above(accuracy: float, share: float, rows: int) -> bool:
    """By more than a standard error of a model that is right with this share of so many rows."""
    return accuracy > share + math.sqrt(share * (1.0 - share) / rows)


def always_same(evaluation: Evaluation) -> str | None:
    """The one answer that a model gives to all rows, although not all expect the same."""
    judged = [row for row in evaluation.results if row.correct is not None]
    given = {row.judged[1] for row in judged}
    return given.pop() if len(given) == 1 and len({row.judged[0] for row in judged}) > 1 else None


def never_predicted(evaluation: Evaluation) -> list[str]:
    """Labels that rows have and that the model never chose."""
    chosen = {row.predicted for row in evaluation.results}
    expected = {row.expected for row in evaluation.results}
    return [label for label in evaluation.labels if label in expected and label not in chosen]


def too_weak(tuned: Evaluation) -> bool:
    """Whether a constant answer would do as well: all answers are alike, or the whole interval is below the most
    frequent answer's share.
    """
    best = majority(tuned)
    if tuned.interval is None or best is None:
        return False
    return always_same(tuned) is not None or tuned.interval[1] < best[1]


def shortcomings(base: Evaluation, tuned: Evaluation, words: Words | None) -> list[str]:
    """Sentences: the figures of models that know nothing, and what of the tuned model's answers falls short.

    words: of `bag_of_words`, where it was measured.
    """
    best = majority(tuned)
    if tuned.accuracy is None or best is None:
        return []
    sentences = []
    if tuned.labels:
        others = [f"always {_quoted(best[0])} would have {best[1]:.3f}", f"chance {1 / len(tuned.labels):.3f}"]
        others += [] if words is None else [f"naive Bayes on the words {words.accuracy:.3f}"]
        sentences.append(f"For comparison: {', '.join(others)}.")
    same = always_same(tuned)
    if same is not None:
        sentences.append(f"The tuned model gives the same answer to all rows: {_quoted(same)}.")
    elif tuned.accuracy <= best[1] and len(tuned.results) * best[1] > 1:  # else every answer is expected once
        sentences.append(f"The tuned model is no more often right than always answering {_quoted(best[0])}.")
    if words is not None and tuned.interval is not None and tuned.interval[1] < words.accuracy:
        sentences.append("The tuned model is below naive Bayes on the words: check the rows and the recipe.")
    if (missing := never_predicted(tuned)) and same is None:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        sentences.append(f"Never predicted: {', '.join(map(_quoted, missing[:_NAMED]))}{more}.")
    if tuned.macro_f1 is not None and base.macro_f1 is not None and tuned.macro_f1 < base.macro_f1:
        sentences.append(f"Macro F1 falls from {base.macro_f1:.3f} to {tuned.macro_f1:.3f}: see the single labels.")
    return sentences


def _quoted(answer: str) -> str:
    return f'"{harmless(shorten(answer, 40))}"'
