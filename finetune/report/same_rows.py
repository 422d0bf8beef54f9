"""Matches the held-out rows of two runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from finetune.evaluation.error_kinds import Analysis, Kind
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.row_shares import Found
from finetune.report.prompts import distinct


def same_rows(first: Evaluation, other: Evaluation) -> list[int] | None:
    """For each row of `first` the number of the same row of `other`; None where not all rows have one.

    A row is its prompt and its expected answer. Where one template was exchanged for another all prompts differ; then
    they are compared without what all prompts of a run begin or end with.
    """
    if first.rows != other.rows:
        return None
    exact = _matched(_keys(first), _keys(other))
    return exact if exact is not None else _matched(_keys(first, bare=True), _keys(other, bare=True))


def shared(first: Evaluation, other: Evaluation) -> int:
    """How many rows of `first` are rows of `other`."""
    there = set(_keys(other))
    return sum(key in there for key in _keys(first))


def in_order(evaluation: Evaluation, order: Sequence[int]) -> Evaluation:
    """The same rows in another order."""
    return replace(evaluation, results=tuple(evaluation.results[number] for number in order))


def kinds_in_order(analysis: Analysis, order: Sequence[int]) -> Analysis:
    """The same kinds, their rows by the numbers of that other order."""
    number = {old: new for new, old in enumerate(order)}

    def moved(rows: Found) -> Found:
        return replace(rows, rows=tuple(sorted(number[row] for row in rows.rows if row in number)))

    def kind_moved(kind: Kind) -> Kind:
        return replace(kind, base=kind.base and moved(kind.base), tuned=moved(kind.tuned))

    return replace(analysis, kinds=tuple(map(kind_moved, analysis.kinds)))


def _keys(evaluation: Evaluation, bare: bool = False) -> list[Hashable]:
    """bare: without the template around the prompts."""
    prompts = [row.prompt for row in evaluation.results]
    prompts = [prompt.strip() for prompt in distinct(prompts)] if bare else prompts
    return [(prompt, (row.expected or "").strip()) for prompt, row in zip(prompts, evaluation.results, strict=True)]


def _matched(keys: Sequence[Hashable], others: Sequence[Hashable]) -> list[int] | None:
    places: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in reversed(list(enumerate(others))):
        places[key].append(number)
    order = [places[key].pop() if places.get(key) else None for key in keys]
    return [number for number in order if number is not None] if None not in order else None
