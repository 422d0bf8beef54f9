"""Successive runs on the same held-out rows: what changed, which error kinds are gone, what to add next.

Every test is McNemar's exact one on the rows that changed; where `loss_decides`, a run is tested by its loss. Holm's
correction covers all tests of one family: that of the whole figure, and that of the kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import holm, mcnemar_exact, weighted_mean_interval, wilson_interval
from finetune.evaluation.paired_changes import LEAST_CHANGED, SIGNIFICANT, loss_change, loss_decides

MOST_ADVISED = 5  # kinds for which to add rows
KindKey = tuple[str, tuple[str, str] | None]  # a kind's name and, of a confusion, (true, predicted)


@dataclass(frozen=True)
class Measured:
    """One run on the rows: the share right, or the loss."""

    value: float
    interval: tuple[float, float] | None  # 95 %
    right: int | None  # rows; None where the loss is compared


@dataclass(frozen=True)
class Shift:
    """Rows under an earlier and a later run: of an error, or of one kind of it. Rows are numbers, from 0."""

    fixed: tuple[int, ...]  # had it before, and not after
    still: tuple[int, ...]
    new: tuple[int, ...]
    p_value: float
    corrected: float  # by Holm, over all shifts of its family
    verdict: str


@dataclass(frozen=True)
class Step:
    """A later run against an earlier one."""

    before: int  # numbers of the runs, from 0
    after: int
    seed_alone: bool  # whether nothing but the seed differs
    errors: Shift
    loss_change: float | None = None  # nats per token on the same rows, where the loss decides
    loss_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class KindLine:
    """One kind of error through all runs."""

    name: str
    labels: tuple[str, str] | None
    measured: int  # rows that were looked at
    counts: tuple[int, ...]  # one for each run
    intervals: tuple[tuple[float, float], ...]  # of the shares, 95 %
    shifts: tuple[Shift, ...]  # as the steps


@dataclass(frozen=True)
class Advice:
    """A kind of error that is left in the last run, with its rows: those that no run got right come first."""

    name: str
    labels: tuple[str, str] | None
    measured: int
    rows: tuple[int, ...]
    always: int  # of these rows, how many have it in every run
    interval: tuple[float, float]


@dataclass(frozen=True)
class Iterations:
    """All runs on the same rows."""

    measure: str  # accuracy, exact match, ..., or loss
    rows: int
    runs: tuple[Measured, ...]
    steps: tuple[Step, ...]  # each run against the one before; with three or more, the last against the first too
    kinds: tuple[KindLine, ...]
    advice: tuple[Advice, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_runs(
    runs: Sequence[Evaluation],
    analyses: Sequence[Analysis | None],
    seed_alone: Collection[tuple[int, int]] = (),
) -> Iterations:
    """runs: at least two, row by row of the same rows. seed_alone: (earlier, later) where only the seed differs."""
    measure = _measure(runs)
    pairs = [(i, i + 1) for i in range(len(runs) - 1)] + ([(0, len(runs) - 1)] if len(runs) > 2 else [])
    steps = _steps(runs, pairs, seed_alone)
    tables = [kinds_of(run, analysis) for run, analysis in zip(runs, analyses, strict=True)]
    lines = _kind_lines(tables, pairs)
    figures = tuple(_measured(run, measure) for run in runs)
    return Iterations(measure, runs[0].rows, figures, tuple(steps), tuple(lines), tuple(_advice(tables)))


def _measure(runs: Sequence[Evaluation]) -> str:
    """The loss where answers are not right or wrong, and where no open one is right in any run."""
    unjudged = any(run.accuracy is None for run in runs)
    return "loss" if unjudged or not any(run.labels or run.accuracy for run in runs) else runs[0].measure


def _measured(run: Evaluation, measure: str) -> Measured:
    if measure == "loss":
        losses, tokens = [row.loss for row in run.results], [row.tokens for row in run.results]
        return Measured(run.loss, weighted_mean_interval(losses, tokens) if len(losses) > 1 else None, None)
    right = sum(bool(row.correct) for row in run.results)
    return Measured(right / run.rows, wilson_interval(right, run.rows), right)


def _steps(
    runs: Sequence[Evaluation], pairs: Sequence[tuple[int, int]], seed_alone: Collection[tuple[int, int]]
) -> list[Step]:
    """Each by the rows that it fixed and broke, or where `loss_decides` by the loss; all of them one family."""
    wrong = [{i for i, row in enumerate(run.results) if row.correct is False} for run in runs]
    changes = [
        loss_change(runs[a].results, runs[b].results) if loss_decides(runs[a], runs[b]) else None for a, b in pairs
    ]
    by_loss = {i: change.p_value for i, change in enumerate(changes) if change}
    shifts = _shifts([(wrong[a], wrong[b]) for a, b in pairs], ("Better", "Worse"), by_loss)
    steps = []
    for (a, b), shift, change in zip(pairs, shifts, changes, strict=True):
        if change:
            same = all(x.loss == y.loss for x, y in zip(runs[a].results, runs[b].results, strict=True))
            better = ("Better" if change.mean < 0 else "Worse") if shift.corrected < SIGNIFICANT else None
            shift = replace(shift, verdict=better or ("No change" if same else "No clear difference"))
        alone = (a, b) in seed_alone
        if alone and shift.verdict in ("Better", "Worse"):  # which of two draws is better says nothing of the recipe
            shift = replace(shift, verdict="Only the seed differs")
        steps.append(Step(a, b, alone, shift, change and change.mean, change and change.interval))
    return steps


def _shifts(
    pairs: Sequence[tuple[Collection[int], Collection[int]]],
    words: tuple[str, str],
    by_loss: Mapping[int, float] = MappingProxyType({}),
) -> list[Shift]:
    """Of (rows before, rows after) each, as one family. words: for significantly fewer rows, and for more. by_loss: the
    p-values of pairs that the loss decides, by their numbers.
    """
    changes = [({*a} - {*b}, {*a} & {*b}, {*b} - {*a}) for a, b in pairs]
    p_values = {i: mcnemar_exact(len(fixed), len(new)) for i, (fixed, _, new) in enumerate(changes)} | {**by_loss}
    tested = [i for i, (fixed, _, new) in enumerate(changes) if len(fixed) + len(new) >= LEAST_CHANGED]
    tested = sorted({*tested, *by_loss})
    corrected = dict(zip(tested, holm([p_values[i] for i in tested]), strict=True))
    shifts = []
    for i, (fixed, still, new) in enumerate(changes):
        p = corrected.get(i, 1.0)
        word = "No clear difference" if fixed or new else "No change"
        if p < SIGNIFICANT:
            word = words[len(new) > len(fixed)]
        rows = [tuple(sorted(which)) for which in (fixed, still, new)]
        shifts.append(Shift(rows[0], rows[1], rows[2], p_values[i], p, word))
    return shifts


def kinds_of(run: Evaluation, analysis: Analysis | None) -> dict[KindKey, tuple[int, frozenset[int]]]:
    """Each kind's rows under the tuned model, and how many rows were looked at for it.

    Confusions are told from the answers, whole: a run records the most frequent ones. So are the kinds of open answers
    where a run has recorded none.
    """
    if analysis is not None and not run.labels:
        return {(kind.name, kind.labels): (kind.measured, frozenset(kind.tuned.rows)) for kind in analysis.kinds}
    by_kind: dict[KindKey, tuple[int, set[int]]] = {}
    support = {label: sum(row.expected == label for row in run.results) for label in run.labels}
    for i, row in enumerate(run.results):
        if row.correct is False:
            for key, measured in _plain_kinds(row, support, run.rows).items():
                by_kind.setdefault(key, (measured, set()))[1].add(i)
    return {key: (measured, frozenset(rows)) for key, (measured, rows) in by_kind.items()}


def _plain_kinds(row: RowResult, support: Mapping[str, int], rows: int) -> dict[KindKey, int]:
    """The kinds of a wrong row, each with the rows that could have had it."""
    if support:
        return {("confusion", (str(row.expected), str(row.predicted))): support[str(row.expected)]}
    kinds: dict[KindKey, int] = {("wrong", None): rows}
    return kinds if (row.predicted or "").strip() else kinds | {("empty", None): rows}


def _kind_lines(
    tables: Sequence[Mapping[KindKey, tuple[int, frozenset[int]]]], pairs: Sequence[tuple[int, int]]
) -> list[KindLine]:
    """Those that any run has rows of, the most frequent in the last run first. All their shifts are one family."""
    there = [key for key in dict.fromkeys(k for t in tables for k in t) if any(t.get(key, (0, ()))[1] for t in tables)]
    rows = {key: [table[key][1] if key in table else frozenset[int]() for table in tables] for key in there}
    shifts = _shifts([(rows[key][a], rows[key][b]) for key in there for a, b in pairs], ("Fixed", "Worse"))
    lines = []
    for number, key in enumerate(there):
        counts = tuple(map(len, rows[key]))
        measured = max(table[key][0] for table in tables if key in table)
        intervals = tuple(wilson_interval(min(count, measured), measured) for count in counts)
        own_shifts = tuple(shifts[number * len(pairs) : (number + 1) * len(pairs)])
        lines.append(KindLine(*key, measured, counts, intervals, own_shifts))
    return sorted(lines, key=lambda line: (-line.counts[-1], -max(line.counts)))


def _advice(tables: Sequence[Mapping[KindKey, tuple[int, frozenset[int]]]]) -> list[Advice]:
    """What is left in the last run, the surest kind first: by the lower end of its interval."""
    advised = []
    for key, (measured, rows) in tables[-1].items():
        if rows:
            always = rows.intersection(*(table[key][1] if key in table else () for table in tables))
            ordered = (*sorted(always), *sorted(rows - always))
            interval = wilson_interval(min(len(rows), measured), measured)
            advised.append(Advice(*key, measured, ordered, len(always), interval))
    specific = [one for one in advised if one.name != "wrong"] or advised  # `wrong` holds the others' rows
    return sorted(specific, key=lambda advice: (-advice.interval[0], -len(advice.rows)))[:MOST_ADVISED]
