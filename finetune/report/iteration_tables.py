"""Runs side by side on the terminal: figures, what each step changed, kinds of error, and what to add next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune.console import Console, lines
from finetune.evaluation.iterations import Advice, Iterations, KindLine, Measured
from finetune.report.iterations import Compared
from finetune.report.tables import figures_table
from finetune.text import shorten

MOST_KINDS, MOST_CHANGES, MOST_NAMED = 12, 12, 5
_STYLES = {"Better": "green", "Fixed": "green", "Worse": "red"}


def print_iterations(console: Console, compared: Compared) -> None:
    console.print(lines(compared.sentence, style="bold"))
    for note in compared.notes:
        console.print(lines(note))
    for part in _parts(compared):
        console.print(part)


def _parts(compared: Compared) -> Iterator[RenderableType]:
    names, iterations = compared.names, compared.iterations
    yield _runs_table(names, compared)
    yield _steps_table(iterations)
    if iterations.kinds:
        yield _kinds_table(iterations)
    for step, changes in zip(iterations.steps, compared.changes, strict=True):
        if step.after == step.before + 1:
            yield _changes(step.before + 1, step.after + 1, [(c.what, c.before, c.after) for c in changes])
    yield from _advice(compared)


def _runs_table(names: Sequence[str], compared: Compared) -> Table:
    iterations, forgotten = compared.iterations, compared.forgotten
    with_forgetting = any(forgotten)
    by_loss = iterations.measure == "loss"
    more = [*([] if by_loss else ["loss"]), *(["forgot"] if with_forgetting else [])]
    table = _table("", "run", iterations.measure, "95 % interval", "wrong", *more, texts=2)
    for i, (name, figures) in enumerate(zip(names, iterations.runs, strict=True)):
        wrong = "-" if figures.right is None else f"{iterations.rows - figures.right:,}"
        change = forgotten[i]
        forgot = [f"{change.change:+.3f}" if change else "-"] if with_forgetting else []
        loss = [] if by_loss else [f"{compared.losses[i]:.4f}"]
        table.add_row(str(i + 1), _cell(name), _value(figures), _interval(figures), wrong, *loss, *forgot)
    table.caption = "forgot: change of the loss on general text, nats per token" if with_forgetting else None
    return table


def _steps_table(iterations: Iterations) -> Table:
    """The change of the loss stands where it decides."""
    shares, by_loss = iterations.measure != "loss", any(step.loss_change is not None for step in iterations.steps)
    columns = [*(["fixed", "still", "broken"] * shares), *(["change of loss"] * by_loss)]
    table = _table("step", "", *columns, "p", "p, Holm", texts=2)
    for step in iterations.steps:
        errors = step.errors
        counts = [f"{len(rows):,}" for rows in (errors.fixed, errors.still, errors.new)] * shares
        change = ["" if step.loss_change is None else f"{step.loss_change:+.4f}"] * by_loss
        verdict = Text(errors.verdict, _STYLES.get(errors.verdict, ""))
        name = f"{step.before + 1} -> {step.after + 1}"
        table.add_row(name, verdict, *counts, *change, f"{errors.p_value:.2g}", f"{errors.corrected:.2g}")
    return table


def _kinds_table(iterations: Iterations) -> Table:
    """A kind's rows in each run, and of the last step what became of them."""
    numbers = [str(i + 1) for i in range(len(iterations.runs))]
    last = iterations.steps[-1]
    table = _table("kind of error", *numbers, "fixed", "still", "new", "p, Holm", "", texts=1)
    for line in iterations.kinds[:MOST_KINDS]:
        shift = line.shifts[-1]
        rows = [f"{len(rows):,}" for rows in (shift.fixed, shift.still, shift.new)]
        style = _STYLES.get(shift.verdict, "")
        table.add_row(_cell(kind_name(line)), *(f"{count:,}" for count in line.counts), *rows, f"{shift.corrected:.2g}",
                      Text(shift.verdict, style))  # fmt: skip
    more = len(iterations.kinds) - MOST_KINDS
    table.caption = f"rows of each run; fixed, still and new: run {last.before + 1} -> {last.after + 1}"
    table.caption += f"; {more} more kinds" if more > 0 else ""
    return table


def _changes(before: int, after: int, changes: Sequence[tuple[str, str, str]]) -> RenderableType:
    if not changes:
        return lines(f"run {before} -> {after}: nothing changed in recipe or data")
    shown = [f"  {what}: {shorten(old, 60)} -> {shorten(new, 60)}" for what, old, new in changes[:MOST_CHANGES]]
    more = [f"  and {len(changes) - MOST_CHANGES} more"] * (len(changes) > MOST_CHANGES)
    return lines(f"changed from run {before} to {after}:", *shown, *more)


def _advice(compared: Compared) -> Iterator[RenderableType]:
    """Nothing where nothing is wrong any more."""
    results = compared.runs[-1].tuned.results
    if compared.iterations.advice:
        yield Text("to add data for next, the surest kind first:", "bold")
    for advice in compared.iterations.advice:
        share = f"{len(advice.rows):,} of {advice.measured:,} rows"
        always = f", {advice.always:,} of them in every run" if advice.always else ""
        places = ", ".join(results[row].location for row in advice.rows[:MOST_NAMED])
        yield lines(f"{kind_name(advice)}: {share}{always}; rows like {shorten(places, 200)}")


def kind_name(kind: KindLine | Advice) -> str:
    return f'"{kind.labels[0]}" taken for "{kind.labels[1]}"' if kind.labels else kind.name


def _table(*headings: str, texts: int) -> Table:
    """Figures on one line."""
    table = figures_table(*headings, texts=texts)
    table.caption_justify = "left"
    for column in table.columns[texts:]:
        column.no_wrap = True
    return table


def _cell(text: str) -> Text:
    return lines(shorten(text, 46), no_wrap=True, overflow="ellipsis")


def _value(figures: Measured) -> str:
    return f"{figures.value:.4f}" if figures.right is None else f"{figures.value:.1%}"


def _interval(figures: Measured) -> str:
    if figures.interval is None:
        return "-"
    low, high = figures.interval
    return f"{low:.3f}-{high:.3f}" if figures.right is None else f"{100 * low:.1f}-{100 * high:.1f}"
