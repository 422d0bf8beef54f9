"""Terminal tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.console import lines
from finetune.data.rows import Prepared
from finetune.evaluation.error_kinds import Kind
from finetune.evaluation.intervals import worst_confusions
from finetune.events import Validated
from finetune.report.measures import measures_of, value_of
from finetune.report.prompts import distinct
from finetune.text import from_here, one_line, shorten

MOST_LABELS = 12  # in a whole confusion matrix; of a larger one only the most frequent confusions are shown
WORST = 10  # of those
ROWS_SHOWN = 5  # fixed rows, and as many broken rows
TEXT_SHOWN = 160  # characters of a row's text
ROWS_NAMED = 5  # of those that were shortened or left out; data.json has them all


class Answered(Protocol):
    """What is shown of a held-out row under one model."""

    @property
    def location(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def expected(self) -> str | None: ...
    @property
    def predicted(self) -> str | None: ...


Pair = tuple[Answered, Answered]  # the same row under the base and under the tuned model


def figures_table(*headings: str, texts: int = 1) -> Table:
    """The first `texts` columns hold words, the others figures."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < texts else "right", overflow="fold")
    return table


def account_table(prepared: Prepared) -> Table:
    """What became of the rows of each split. `account_notes` names those that were shortened or left out."""
    table = figures_table("split", "rows", "whole", "used", "tokens", "supervised", "shortened", "left out")
    for split in prepared.splits:
        figures = (f"{split.account[key]:,}" for key in ("rows", "good", "used", "tokens", "supervised_tokens"))
        table.add_row(split.name, *figures, f"{len(split.shortened):,}", f"{len(split.left_out):,}")
    return table


def account_notes(prepared: Prepared) -> list[str]:
    """What a person should know of how the rows were read: each note once, with its split unless all splits say it; and
    the first rows of each split that were shortened or left out.
    """
    notes = {split.name: split.notes for split in prepared.splits}
    distinct = dict.fromkeys(note for split in notes.values() for note in split)
    first = {note: next(name for name, split in notes.items() if note in split) for note in distinct}
    said = [note if all(note in split for split in notes.values()) else f"{first[note]}: {note}" for note in distinct]
    for split in prepared.splits:
        if split.shortened:
            more = f", and {len(split.shortened) - ROWS_NAMED:,} more" if len(split.shortened) > ROWS_NAMED else ""
            said.append(f"{split.name}, shortened: {', '.join(split.shortened[:ROWS_NAMED])}{more}")
        if split.left_out:
            named = [f"  {location}: {reason}" for location, reason in split.left_out[:ROWS_NAMED]]
            last = [f"  and {len(split.left_out) - ROWS_NAMED:,} more"] * (len(split.left_out) > ROWS_NAMED)
            said += [f"{split.name}, left out:", *named, *last]
    return [one_line(from_here(note)) for note in said]


def epoch_table(validations: Sequence[Validated], newest: int | None = None) -> Table:
    """One row per validation; 40 columns wide; the best is marked. `newest`: show only so many, and the best."""
    best = max((i for i, validated in enumerate(validations) if validated.best), default=None)
    shown = [i for i in range(len(validations)) if newest is None or i >= len(validations) - newest or i == best]
    judged = any(validated.accuracy is not None for validated in validations)
    tokens = any(validated.token_accuracy is not None for validated in validations)  # none of pairs of answers
    headings = [("epoch",), ("train", "loss"), ("valid.", "loss"), *[("perpl.",), ("token", "acc.")] * tokens]
    headings += [("label", "acc.") if tokens else ("prefer.", "acc.")] * judged
    table = _table(*(lines(*heading) for heading in headings), texts=0)
    for i in shown:
        validated = validations[i]
        table.add_row(
            f"{validated.epoch:.2f}",
            "-" if validated.train_loss is None else f"{validated.train_loss:.4f}",
            f"{validated.loss:.4f}{'*' if i == best else ' '}",
            *([_perplexity(validated.perplexity), _percent(validated.token_accuracy)] if tokens else []),
            *([_percent(validated.accuracy)] if judged else []),
            style="bold green" if i == best else None,
        )
    table.caption = "* best" + (f"; {len(validations) - len(shown)} not shown" if len(shown) < len(validations) else "")
    return table


def comparison_table(base: Mapping[str, Any], tuned: Mapping[str, Any], title: str | None = None) -> Table:
    """Base and tuned side by side, without the measures that neither has. An empty `base`: the tuned model alone."""
    table = _table("", *(["base"] if base else []), "tuned", *(["change"] if base else []), title=title)
    for key, name, more in measures_of(tuned):
        before, after = value_of(base, key), value_of(tuned, key)
        if before is not None or after is not None:
            cells: list[str | Text] = [_measured(key, after)]
            if base:
                cells = [_measured(key, before), *cells, _change(key, before, after, more)]
            table.add_row(name, *cells)
        shares = key == "accuracy"
        bounds = [values.get("interval" if shares else f"{key}_interval") for values in (base, tuned) if values]
        if any(bounds):
            table.add_row("95 % interval" + ", %" * shares, *(_interval(ends, shares) for ends in bounds))
    return table


def per_class_table(classes: Sequence[Mapping[str, Any]]) -> Table:
    """Precision, recall, F1 and support of each label, as `intervals.per_class` gives them."""
    table = _table("label", "precision", "recall", "F1", "support")
    for scores in classes:
        figures = (f"{scores[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(_cell(str(scores["label"]), 40), *figures, f"{scores['support']:,}")
    return table


def confusion_table(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> Table:
    """`matrix[true][predicted]` for up to 12 labels; with more labels, the 10 most frequent confusions."""
    if len(labels) > MOST_LABELS:
        return _worst_confusions(matrix, labels)
    table = _table("true \\ predicted", *(str(i + 1) for i in range(len(labels))))
    for i, (row, label) in enumerate(zip(matrix, labels, strict=True)):
        styles = ("bold green" if i == j else "red" if count else "dim" for j, count in enumerate(row))
        cells = [Text(f"{count:,}", style) for count, style in zip(row, styles, strict=True)]
        table.add_row(_cell(f"{i + 1} {label}", 26), *cells)
    return table


def kinds_table(kinds: Sequence[Kind]) -> Table:
    """How many held-out rows each kind of error has, before and after; without the kinds of no row."""
    before = any(kind.base for kind in kinds)
    interval = lines("tuned, 95 %", "interval, %")
    table = _table("kind of error", "of", *(["base"] if before else []), "tuned", interval, *(["p"] if before else []))
    for kind in kinds:
        if not kind.occurs:
            continue
        name = kind.name if kind.labels is None else f"{kind.labels[0]} taken for {kind.labels[1]}"
        base = [f"{kind.base.count:,}" if kind.base else "-"] if before else []
        cells = [f"{kind.measured:,}", *base, f"{kind.tuned.count:,}"]
        p_value = [] if not before else ["-" if kind.p_value is None else f"{kind.p_value:.2g}"]
        table.add_row(_cell(name, 40), *cells, _interval(kind.tuned.interval, True), *p_value)
    return table


def changed_rows_table(fixed: Sequence[Pair], broken: Sequence[Pair]) -> Table:
    """Rows that tuning fixed or broke: the first five of each, with shortened text."""
    shown = [("fixed", "green", pair) for pair in fixed[:ROWS_SHOWN]]
    shown += [("broken", "red", pair) for pair in broken[:ROWS_SHOWN]]
    table = Table.grid(padding=(0, 1))
    texts = distinct([base.prompt for _, _, (base, _) in shown])
    for (kind, style, (base, tuned)), text in zip(shown, texts, strict=True):
        shown_answers = {"expected": base.expected, "base": base.predicted, "tuned": tuned.predicted}
        answers = ", ".join(f"{name}: {shorten(answer or '', 60)}" for name, answer in shown_answers.items())
        row = Group(lines(base.location, style="dim"), lines(shorten(text, TEXT_SHOWN)), lines(answers, style="italic"))
        table.add_row(Text(kind, style), row)
    table.caption_justify = "left"
    more = len(fixed) + len(broken) - len(shown)
    table.caption = f"{len(fixed)} fixed, {len(broken)} broken" + (f"; {more} of them not shown" if more else "")
    return table


def _table(*headings: str | Text, texts: int = 1, title: str | None = None) -> Table:
    """The first `texts` columns hold words, the others figures."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, title_justify="left")
    table.title = None if title is None else lines(title, style="bold")
    table.caption_justify = "left"
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < texts else "right", no_wrap=i >= texts)
    return table


def _cell(text: str, length: int) -> Text:
    """The text of a cell: cut, not wrapped, where the column is narrow."""
    return lines(shorten(text, length), no_wrap=True, overflow="ellipsis")


def _worst_confusions(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> Table:
    pairs = worst_confusions(matrix, len(labels) ** 2)
    table = _table("true", "predicted", "rows", "of true", texts=2)
    for true, predicted, rows in pairs[:WORST]:
        share = f"{rows / sum(matrix[true]):.0%}"
        table.add_row(_cell(labels[true], 40), _cell(labels[predicted], 40), f"{rows:,}", share)
    table.caption = which_confusions(min(WORST, len(pairs)), len(pairs))
    return table


def which_confusions(shown: int, all_of_them: int) -> str:
    if shown < all_of_them:
        return f"the {shown} most frequent of {all_of_them:,} confusions"
    return {0: "no confusions", 1: "the only confusion"}.get(shown, f"all {shown} confusions")


def _measured(key: str, value: float | None) -> str:
    if value is None or "accuracy" in key:
        return _percent(value)
    return _perplexity(value) if key == "perplexity" else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None, shares: bool) -> str:
    return "-" if bounds is None else "-".join(f"{100 * end:.1f}" if shares else f"{end:.3f}" for end in bounds)


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10_000 else f"{value:.1e}"


def _change(key: str, before: float | None, after: float | None, more_is_better: bool) -> Text:
    if before is None or after is None:
        return Text("-")
    change = after - before
    text = f"{100 * change:+.1f} pt" if "accuracy" in key else f"{change:+.4g}"
    return Text(text, "" if change == 0 else "green" if (change > 0) == more_is_better else "red")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
