"""Figures per group and length, and answers that change when a pronoun or name does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np

from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import fisher_exact, holm, mcnemar_exact
from finetune.evaluation.leaked import Figure, figure_of
from finetune.evaluation.paired_changes import SIGNIFICANT
from finetune.evaluation.row_shares import Found
from finetune.recipe.schema import Swaps as Swapped
from finetune.text import shorten

# The first pair that has a word says what stands for it: "her" is "his" more often than "him".
PRONOUNS = (
    ("she", "he"), ("her", "his"), ("him", "her"), ("hers", "his"), ("herself", "himself"), ("woman", "man"),
    ("women", "men"), ("girl", "boy"), ("girls", "boys"), ("mother", "father"), ("daughter", "son"),
    ("wife", "husband"), ("sister", "brother"), ("actress", "actor"), ("queen", "king"), ("lady", "gentleman"),
    ("mrs", "mr"),
)  # fmt: skip
By = Literal["group", "length"]
FEWEST = 5  # rows of a slice, and beside it, to compare them
MOST = 50  # slices of one kind, the largest
PARTS = 4  # of the rows by their length


@dataclass(frozen=True)
class Slice:
    """Both models on the rows of one group, or of one length."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    by: By
    name: str
    measure: Literal["accuracy", "loss"]
    rows: int
    base: Figure | None  # None where the base model was not measured
    tuned: Figure
    p_base: float | None = None  # of a difference from all other rows, Holm's over the slices of one `by`
    p_tuned: float | None = None


@dataclass(frozen=True)
class Swaps:
    """Held-out rows asked again with their words swapped (she for he), which should change no answer."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    rows: int  # that hold a word of the list, and were asked again
    base: Found | None  # answers that change; None where the base model was not measured
    tuned: Found
    p_value: float | None  # McNemar's exact test of flips before and after
    message: str


def slices(base: Evaluation | None, tuned: Evaluation, named: Mapping[By, Mapping[str, Sequence[int]]]) -> list[Slice]:
    """named: by what -> the slice's name -> its rows' numbers. A slice of all rows, or of none, is left out."""
    found = []
    # Where no open answer matches word for word, as is usual, only the loss can tell rows apart.
    judged = tuned.accuracy is not None and any((tuned.labels, tuned.accuracy, base and base.accuracy))
    for by, rows_of in named.items():
        largest = sorted(rows_of, key=lambda name: -len(rows_of[name]))[:MOST]
        chosen = {name: rows_of[name] for name in rows_of if name in largest and 0 < len(rows_of[name]) < tuned.rows}
        before: Mapping[str, float | None] = _p_values(base, chosen, judged) if base else dict.fromkeys(chosen)
        after = _p_values(tuned, chosen, judged)
        for name, rows in chosen.items():
            first = None if base is None else _figure(base, rows, judged)
            second = _figure(tuned, rows, judged)
            measure: Literal["accuracy", "loss"] = "accuracy" if judged else "loss"
            found.append(Slice(by, name, measure, len(rows), first, second, before[name], after[name]))
    return found


def by_length(lengths: Sequence[int]) -> dict[str, list[int]]:
    """The rows in four parts of like size, by the tokens of their prompts; fewer parts where many are equally long."""
    edges = sorted({int(edge) for edge in np.quantile(lengths, np.linspace(0, 1, PARTS + 1)[1:])}) if lengths else []
    named: dict[str, list[int]] = {}
    low = min(lengths, default=0)
    for edge in edges:
        rows = [row for row, length in enumerate(lengths) if low <= length <= edge]
        if rows:
            named[f"{low} to {edge} tokens" if low < edge else f"{edge} tokens"] = rows
        low = edge + 1
    return named


def _figure(evaluation: Evaluation, rows: Sequence[int], judged: bool) -> Figure:
    return figure_of([evaluation.results[row] for row in rows], judged)


def _p_values(evaluation: Evaluation, rows_of: Mapping[str, Sequence[int]], judged: bool) -> dict[str, float | None]:
    """Of each slice against all other rows, Holm's. Two slices that are each other's rest are one test."""
    sets = {name: frozenset(rows) for name, rows in rows_of.items()}
    every = frozenset(range(len(evaluation.results)))
    tests: dict[frozenset[frozenset[int]], float] = {}
    for rows in sets.values():
        rest = every - rows
        if min(len(rows), len(rest)) >= FEWEST:
            tests[frozenset((rows, rest))] = _p_value(evaluation, rows, rest, judged)
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    return {name: corrected.get(frozenset((rows, every - rows))) for name, rows in sets.items()}


def _p_value(evaluation: Evaluation, rows: frozenset[int], rest: frozenset[int], judged: bool) -> float:
    here, there = ([evaluation.results[row] for row in sorted(part)] for part in (rows, rest))
    if not judged:
        return _loss_differs(here, there)
    right, right_there = (sum(bool(row.correct) for row in part) for part in (here, there))
    return fisher_exact(right, len(here) - right, right_there, len(there) - right_there)


def _loss_differs(here: Sequence[RowResult], there: Sequence[RowResult]) -> float:
    """Welch's test of the rows' mean losses, by the normal distribution."""
    a, b = (np.array([row.loss for row in part]) for part in (here, there))
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return 1.0 if error == 0 else 2 * (1 - NormalDist().cdf(abs(float(a.mean() - b.mean())) / error))


def pairs_of(swaps: Swapped) -> Sequence[Sequence[str]]:
    """The pairs of words that a recipe's `evaluate.swaps` means."""
    return {"none": (), "pronouns": PRONOUNS}[swaps] if isinstance(swaps, str) else swaps


def swapped(text: str, pairs: Sequence[Sequence[str]]) -> str:
    """The text with each word of a pair in place of the other, written as that one was: She -> He."""
    other: dict[str, str] = {}
    for one, two in pairs:
        other.setdefault(one.casefold(), two)
        other.setdefault(two.casefold(), one)
    if not other:
        return text
    listed = "|".join(sorted(map(re.escape, other), key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)
    return pattern.sub(lambda match: _as_written(other[match[0].casefold()], match[0]), text)


def _as_written(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word


def flips(
    asked: Sequence[int], first: Evaluation, again: Sequence[str | None], pairs: Sequence[Sequence[str]], labelled: bool
) -> Found:
    """asked: the rows' numbers; again: the answers to the swapped rows. An open answer is swapped back before."""
    flipped = []
    for row, answer in zip(asked, again, strict=True):
        before = first.results[row].predicted or ""
        same = answer == before if labelled else _plain(swapped(before, pairs)) == _plain(answer or "")
        if not same:
            flipped.append(row)
    return Found.of(flipped, len(asked))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def swaps_of(asked: Sequence[int], base: Found | None, tuned: Found) -> Swaps:
    total = len(asked)
    p_value = None
    before = ""
    if base is not None:
        one, other = set(base.rows), set(tuned.rows)
        p_value = mcnemar_exact(len(one - other), len(other - one))
        before = f"of the base model {base.share:.1%} ({base.interval[0]:.1%} to {base.interval[1]:.1%}), "
    message = (
        f"Swapped words (evaluate.swaps) in {total:,} held-out rows: {before}of the tuned model {tuned.share:.1%} "
        f"({tuned.interval[0]:.1%} to {tuned.interval[1]:.1%}) of the answers change"
    )
    said = "" if p_value is None else f" (McNemar's exact test: p = {p_value:.2g})"
    return Swaps(total, base, tuned, p_value, f"{message}{said}.")


def sentences(measured: Sequence[Slice]) -> list[str]:
    """What is clearly different, said with care: what was measured, on how many rows."""
    said = []
    for one in measured:
        if one.p_tuned is None or one.p_tuned >= SIGNIFICANT:
            continue
        low, high = one.tuned.interval or (one.tuned.value, one.tuned.value)
        clear = one.p_base is not None and one.p_base < SIGNIFICANT
        before = "not measured" if one.p_base is None else "also so" if clear else "no clear difference"
        name = shorten(one.name, 40)
        said.append(
            f"Differs by {one.by}: {one.measure} {one.tuned.value:.3f} ({low:.3f} to {high:.3f}) on the {one.rows:,} "
            f"held-out rows of {name}, against all others p = {one.p_tuned:.2g} (Holm); base model: {before}."
        )
    return said
