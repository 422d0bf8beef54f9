"""What a person reads before and after a run, in the terminal and in report.txt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.data.rows import Prepared
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.evaluate import Evaluation
from finetune.report.report import Comparison, Report
from finetune.report.tables import (
    changed_rows_table,
    comparison_table,
    confusion_table,
    epoch_table,
    per_class_table,
    plain_page,
)

if TYPE_CHECKING:
    from finetune.training.job import Job

SHOWN_PLACES = 5  # rows named in the terminal; data.json has them all


def print_account(job: Job, run: RunFolder) -> None:
    """Before training: where the run stands, what it runs on, and what became of the rows."""
    console = Console(stderr=True)
    console.print(f"run {run.path} on {job.backend}, base {job.recipe.model.path}", markup=False, soft_wrap=True)
    console.print(account_table(job.prepared))


def account_table(prepared: Prepared) -> Table:
    """Rows read, used, shortened and dropped in each split, with the first places of the last two."""
    table = Table("split", "rows", "used", "tokens", "supervised", "shortened", "dropped")
    splits = {"train": prepared.train, "valid": prepared.valid} | ({"test": prepared.test} if prepared.test else {})
    for name, split in splits.items():
        table.add_row(
            name,
            f"{split.rows:,}",
            f"{len(split.examples):,}",
            f"{sum(len(one.tokens) for one in split.examples):,}",
            f"{int(sum(one.weights.sum() for one in split.examples)):,}",
            Text(_counted([PurePath(place).name for place in split.shortened])),
            Text(_counted([f"{PurePath(place).name}: {reason}" for place, reason in split.dropped])),
        )
    table.caption = Text("\n".join(_notes({name: split.notes for name, split in splits.items()})))
    return table


def _notes(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Each note once; with its split's name unless every split says it."""
    said = dict.fromkeys(note for split in notes.values() for note in split)
    return [
        note if all(note in split for split in notes.values()) else f"{name}: {note}"
        for note in said
        for name in [next(name for name, split in notes.items() if note in split)]
    ]


def _counted(places: Sequence[str]) -> str:
    if not places:
        return "0"
    shown = "\n".join(places[:SHOWN_PLACES])
    return f"{len(places)}\n{shown}" + ("\n..." if len(places) > SHOWN_PLACES else "")


def print_report(report: Report, run: RunFolder) -> None:
    """After training: the answer, on standard output."""
    render(Console(), report)


def as_text(report: Report) -> str:
    return plain_page(lambda console: render(console, report))


def render(console: Console, report: Report) -> None:
    console.print(epoch_table(report.validations))
    console.print(report.overfitting.message, markup=False)
    if report.divergence:
        console.print(report.divergence, style="bold red", markup=False)
    if report.base and report.comparison:
        print_comparison(console, report.base, report.tuned, report.comparison, report.held_out)
    else:
        console.print(comparison_table({}, report.tuned.summary(), title=report.held_out))
    console.print(f"data: {report.check} (check.txt)", markup=False)
    console.print(
        f"base weights: {report.scheme}; {report.backend} on {report.device}\n"
        f"adapter: {report.adapter} ({_which(report.best_step)}; PEFT and mlx-lm load it as it is)\n"
        f"everything else: {report.run} (report.json, rows.jsonl, loss.png, metrics.jsonl)",
        markup=False,
        soft_wrap=True,
    )


def _which(best_step: int) -> str:
    return f"of step {best_step}" if best_step else "untrained: no validation was better than the one before step 1"


def print_comparison(console: Console, base: Evaluation, tuned: Evaluation, comparison: Comparison, rows: str) -> None:
    """Both models side by side, where they are wrong, which rows changed, and the verdict."""
    console.print(comparison_table(base.summary(), tuned.summary(), title=f"on {rows}"))
    if tuned.confusion:
        console.print(per_class_table(tuned.classes))
        console.print(confusion_table(tuned.confusion, tuned.labels))
    if comparison.fixed or comparison.broken:
        console.print(changed_rows_table(comparison.fixed, comparison.broken))
    console.print(comparison.verdict, style="bold", markup=False)
