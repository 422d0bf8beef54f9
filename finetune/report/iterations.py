"""Finished runs on the same rows side by side: figures, and changes in recipe and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.errors import Incompatible
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.forgetting import Change
from finetune.evaluation.iterations import Iterations, compare_runs
from finetune.report.finished_run import FinishedRun
from finetune.report.run_differences import Difference, differences, seed_alone
from finetune.report.same_rows import in_order, kinds_in_order, same_rows, shared
from finetune.text import p_text


@dataclass(frozen=True)
class Compared:
    """At least two runs, their rows in the order of the first."""

    runs: tuple[FinishedRun, ...]
    iterations: Iterations
    changes: tuple[tuple[Difference, ...], ...]  # as iterations.steps
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The verdict of the last run against the first."""
        step = self.iterations.steps[-1]
        measure = self.iterations.measure if step.loss_change is None else "loss"
        before, after = (self._figure(i, measure) for i in (step.before, step.after))
        figures = f"{measure} {before} in {self.names[step.before]}, {after} in {self.names[step.after]}"
        figures += f", on the same {self.iterations.rows} rows"
        fixed, new = len(step.errors.fixed), len(step.errors.new)
        if step.loss_change is None:
            tested = f"{fixed} rows fixed, {new} broken; McNemar's exact test: {p_text(step.errors.p_value)}"
        else:
            tested = f"change {step.loss_change:+.4f}"
            tested += f", {step.loss_interval[0]:+.4f} to {step.loss_interval[1]:+.4f}" if step.loss_interval else ""
            if self.iterations.measure != "loss":
                tested += f"; {self.iterations.measure}: {fixed} rows fixed, {new} broken, too few to tell"
        holms = f"; corrected for {len(self.iterations.steps)} comparisons {p_text(step.errors.corrected)}"
        tested += holms if len(self.iterations.steps) > 1 else ""
        return f"{step.errors.verdict}: {figures} ({tested})." + (_SEED if step.seed_alone else _ONE_EACH)

    @property
    def names(self) -> list[str]:
        """Of the runs: their folders' names, numbered where two are alike."""
        names = [run.name for run in self.runs]
        return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]

    def _figure(self, run: int, measure: str) -> str:
        """With its interval, where it is a share."""
        figures = self.iterations.runs[run]
        if measure == "loss" or figures.interval is None:
            return f"{self.losses[run]:.4f}"
        return f"{figures.value:.1%} ({100 * figures.interval[0]:.1f} to {100 * figures.interval[1]:.1f})"

    @property
    def losses(self) -> list[float]:
        """Of each run, nats per token."""
        return [run.tuned.loss for run in self.runs]

    @property
    def forgotten(self) -> list[Change | None]:
        """Of each run the change of the loss on general text; None where it was not measured."""
        values = [run.analysis and run.analysis.forgetting for run in self.runs]
        return [next((one for one in each.changes if one.name == "all"), None) if each else None for each in values]

    def to_json(self) -> dict[str, Any]:
        runs = [
            {"name": name, "path": str(run.path), "loss": run.tuned.loss}
            | asdict(figures)
            | {"forgotten": change and asdict(change)}
            for name, run, figures, change in zip(
                self.names, self.runs, self.iterations.runs, self.forgotten, strict=True
            )
        ]
        steps = [
            asdict(step) | {"changes": [asdict(change) for change in changes]}
            for step, changes in zip(self.iterations.steps, self.changes, strict=True)
        ]
        values = self.iterations.to_json() | {"runs": runs, "steps": steps, "notes": list(self.notes)}
        return {"verdict": self.sentence} | values


_SEED = " Nothing but the seed differs: so much a draw alone may change."
_ONE_EACH = " One run each: another seed alone changes figures too."


def compared(runs: Sequence[FinishedRun], notes: Sequence[str] = ()) -> Compared:
    """Raises Incompatible where a run was measured on other rows than the first."""
    runs = [runs[0], *(_beside(runs[0], run) for run in runs[1:])]
    analyses: list[Analysis | None] = [run.analysis for run in runs]
    notes = list(notes)
    if None in analyses and any(analyses) and not runs[0].tuned.labels:
        notes.append("Not every run has recorded its kinds of error: those that the answers alone tell are compared.")
        analyses = [None] * len(analyses)
    pairs = [(a, b) for b in range(len(runs)) for a in range(b)]
    alone = {(a, b) for a, b in pairs if seed_alone(runs[a], runs[b])}
    iterations = compare_runs([run.tuned for run in runs], analyses, alone)
    changes = [tuple(differences(runs[step.before], runs[step.after])) for step in iterations.steps]
    return Compared(tuple(runs), iterations, tuple(changes), tuple(notes))


def _beside(first: FinishedRun, run: FinishedRun) -> FinishedRun:
    """The run with its rows in the order of the first."""
    order = same_rows(first.tuned, run.tuned)
    if order is None:
        alike = shared(first.tuned, run.tuned)
        raise Incompatible(
            f"{run.path}: measured on other rows than {first.path}: of the {first.tuned.rows} held-out rows there, "
            f"{alike} are among its {run.tuned.rows}",
            "Measure all runs on the rows of the first with --measure, or on a file of rows with --data FILE.",
        )
    if run.tuned.compared != first.tuned.compared:
        raise Incompatible(
            f"{run.path}: evaluate.answer is {run.tuned.compared}, and {first.tuned.compared} in {first.path}",
            "Compare runs that compare the same part of an answer.",
        )
    return replace(
        run,
        base=run.base and in_order(run.base, order),
        tuned=in_order(run.tuned, order),
        analysis=run.analysis and kinds_in_order(run.analysis, order),
    )
