"""Text shown before and after a run, in the terminal and in report.txt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.console import Console, lines, plain_page
from finetune.data.prompt_parts import always_filled
from finetune.data.rows import Prepared
from finetune.disk import exports
from finetune.disk.adapter_check import in_words
from finetune.disk.atomic import write_file
from finetune.disk.held_out_rows import described
from finetune.disk.metrics import read
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.groups import sentences
from finetune.evaluation.suite import SuiteResult
from finetune.events import StepDone
from finetune.recipe.load import load_recipe
from finetune.report.finished_run import at_the_end, read_finished
from finetune.report.page.run_page import run_page
from finetune.report.page.without_rows import without_rows
from finetune.report.plot import confusion_plot, loss_plot
from finetune.report.report import Comparison, Report
from finetune.report.tables import (
    account_notes,
    account_table,
    changed_rows_table,
    comparison_table,
    confusion_table,
    epoch_table,
    kinds_table,
    per_class_table,
)
from finetune.training.job import Job, beyond_context

PAGE, BARE_PAGE = "report.html", "report-without-rows.html"


def print_account(job: Job, run: RunFolder) -> None:
    """Before training: the run's folder, what it runs on, and what became of the rows."""
    console = Console(stderr=True)
    console.print(f"run {run.path} on {job.backend}, base {job.recipe.model.path}", soft_wrap=True)
    console.print(account_table(job.prepared))
    for note in (*job.folder.notes, *account_notes(job.prepared)):
        console.print(note, soft_wrap=True)
    if beyond := beyond_context(job.folder, job.prepared):
        console.print(beyond, soft_wrap=True)


def print_report(report: Report) -> None:
    """After training: the answer, on standard output."""
    _render(Console(), report)


def as_text(report: Report) -> str:
    """The same page without colour, for report.txt."""
    return plain_page(lambda console: _render(console, report))


def _render(console: Console, report: Report) -> None:
    for line in (*report.facts.lines(), *report.times.lines()):
        console.print(line, soft_wrap=True)
    for line in report.race.lines() if report.race else ():
        console.print(line)
    console.print(epoch_table(report.validations))
    console.print(report.overfitting.message)
    if report.divergence:
        console.print(lines(report.divergence, style="bold red"))
    if report.base and report.comparison:
        print_comparison(console, report.base, report.tuned, report.comparison, report.held_out)
    else:
        console.print(comparison_table({}, report.tuned.summary(), title=report.held_out))
    if report.comparison and report.comparison.words:
        console.print(report.comparison.words.cost)
    if report.analysis:
        render_analysis(console, report.analysis)
    if report.leaked:
        console.print(lines(report.leaked.message, style="bold red"))
    if report.suite:
        print_suite(console, report.suite)
    console.print(f"data: {report.check} (check.txt)")
    for note in report.limited:
        console.print(note)
    kind, loads = Path(report.adapter or "adapter").name, in_words(report.loads)
    facts = (
        f"base weights: {report.scheme}; {report.backend} on {report.device}",
        f"{kind}: {report.adapter} ({'; '.join([_adapter_step(report), *loads])})",
        f"load it as it was measured: {report.adapter}/README.md",
        f"everything else: {report.run} (report.html, report.json, rows.jsonl, kinds.json, metrics.jsonl)",
    )
    for fact in facts:
        console.print(fact, soft_wrap=True)


def render_analysis(console: Console, analysis: Analysis) -> None:
    """Which errors, for whom, and what was forgotten."""
    if any(kind.occurs for kind in analysis.kinds):
        console.print(kinds_table(analysis.kinds))
    if none := [kind.name for kind in analysis.kinds if not kind.occurs and kind.labels is None]:
        console.print(f"in no answer: {', '.join(none)}", soft_wrap=True)
    if (named := {kind.name for kind in analysis.kinds if kind.labels is None}) and not analysis.language:
        console.print("misspelt words were not looked for: there is no list of this language", soft_wrap=True)
    if named and "hallucination" not in named:
        known = "only words of the measured rows count as the data's own"
        console.print(f"the training rows were not read: inventions were not looked for, and {known}", soft_wrap=True)
    for sentence in sentences(analysis.slices):
        console.print(lines(sentence, style="bold red"))
    if analysis.swaps:
        console.print(analysis.swaps.message)
    if analysis.forgetting:
        style = "bold red" if analysis.forgetting.verdict == "forgot" else ""
        console.print(lines(analysis.forgetting.message, style=style))


def _adapter_step(report: Report) -> str:
    if not report.best_step:
        return "untrained: no validation was better than the one before step 1"
    lowest = min(report.validations, key=lambda validated: validated.loss)
    if lowest.step < report.best_step:  # `epochs: auto` keeps its end
        return f"of step {report.best_step}, the end: no less accurate than step {lowest.step}, within a standard error"
    return f"of step {report.best_step}"


def print_comparison(console: Console, base: Evaluation, tuned: Evaluation, comparison: Comparison, rows: str) -> None:
    """Both models side by side, where they are wrong, which rows changed, and the verdict."""
    console.print(comparison_table(base.summary(), tuned.summary(), title=f"on {rows}"))
    if tuned.confusion:
        console.print(per_class_table(tuned.classes))
        console.print(confusion_table(tuned.confusion, tuned.labels))
    if comparison.fixed or comparison.broken:
        console.print(changed_rows_table(comparison.fixed, comparison.broken))
    console.print(lines(comparison.verdict, style="bold"))


def print_suite(console: Console, suite: SuiteResult) -> None:
    """A line for each case that the tuned model fails, and how many both pass."""
    for failure in suite.failures():
        console.print(failure, soft_wrap=True)
    console.print(lines(suite.summary(), style="bold"))


def account_of(prepared: Prepared) -> dict[str, Any]:
    """What became of every row, for data.json."""
    splits = {"train": prepared.train, "valid": prepared.valid, "test": prepared.test}
    return {
        "task": prepared.task,
        "format": prepared.format,
        "template": prepared.template,
        "labels": list(prepared.labels),
        "held_out": described(prepared),
        "always": always_filled(prepared.renderer, prepared.format, prepared.train.records),
        **{name: split and split.account for name, split in splits.items()},
    }


def write_report(run: RunFolder, report: Report) -> None:
    """The report as tables, plots and a page, and its rows; report.json last, which marks the run as finished."""
    exports.write_report(run, as_text(report))
    write_file(run.path / "rows.jsonl", _rows(report))
    if report.analysis:
        values = json.dumps(report.analysis.to_json(), ensure_ascii=False)
        write_file(run.path / "kinds.json", f"{values}\n")
    if report.suite:
        run.write_json("suite.json", report.suite.to_json())
    events = read(run.metrics)
    steps = [event for event in events if isinstance(event, StepDone)]
    title = f"{run.path.name}: loss of {Path(report.facts.model).name}"
    loss_plot(steps, list(report.validations), run.path / "loss.png", title, _chance(report.tuned))
    if report.tuned.confusion:
        confusion_plot(report.tuned.confusion, report.tuned.labels, run.path / "confusion.png")
    write_file(run.path / PAGE, run_page(at_the_end(run, load_recipe(run.recipe), report, events)))
    run.write_json("report.json", report.to_json())


def write_page(path: Path, output: Path | None = None, rows: bool = True) -> Path:
    """The page of a finished run written anew: `output`, or report.html in its folder, or without the texts of its data
    report-without-rows.html. Raises Incompatible."""
    finished = read_finished(path)
    page = run_page(finished) if rows else run_page(without_rows(finished), rows=False)
    file = output or path / (PAGE if rows else BARE_PAGE)
    write_file(file, page)
    return file


def _chance(tuned: Evaluation) -> float | None:
    """The loss, in nats per supervised token, of a choice among the labels at random; None where there are none."""
    return math.log(len(tuned.labels)) * tuned.rows / tuned.tokens if tuned.labels and tuned.tokens else None


def _rows(report: Report) -> str:
    """One JSON line per held-out row, base and tuned side by side. A row's location has the key `place`."""
    before: Sequence[RowResult | None] = report.base.results if report.base else [None] * report.tuned.rows
    written = []
    for base, tuned in zip(before, report.tuned.results, strict=True):
        line: dict[str, Any] = {"place": tuned.location, "prompt": tuned.prompt, "expected": tuned.expected}
        for name, row in (("base", base), ("tuned", tuned)):
            if row is not None:
                line[name] = {"predicted": row.predicted, "correct": row.correct, "loss": row.loss}
                if row.compared is not None:  # the parts of both answers
                    line |= {"compared": row.compared[0]}
                    line[name] |= {"compared": row.compared[1]}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(written)
