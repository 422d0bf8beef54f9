"""One frame of the live screen, composed of panels to fit the window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from finetune.console import lines
from finetune.events import StepDone, Validated
from finetune.report.chart import Chart, Curve, Level
from finetune.report.live_panels import ANSWERS, NARROW, Answers, Foot, Header, Overflow, overflow
from finetune.report.plot import smooth
from finetune.report.screen import Status
from finetune.report.tables import epoch_table
from finetune.text import amount, duration

WIDE, LOW = 100, 24  # columns from which panels stand side by side; lines below which only the most needed is shown
SIDE = 44  # columns of the figures and the epochs, side by side with the chart
TABLE = 40  # columns of the epoch table, and of the predicted times
FIGURES = 29  # columns of the figures in a narrow window
HEADINGS = 4  # lines of the epoch table beside its rows
GAP = Text(" ")  # an empty text is no panel for rich
_TRAINED, _VALID = "cyan", "yellow"


class Frame:
    """The panels of a run, as many and as large as the window allows.

    height: lines to fill; None: those of the window. over: whether nothing happens any more.
    """

    def __init__(self, status: Status, notes: Sequence[str], height: int | None = None, over: bool = False) -> None:
        self._status, self._notes, self._height, self._over = status, notes, height, over

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, self._height or options.height or console.size.height
        whole, cut = Layout(), overflow(options)
        head, foot = Header(self._status), Foot(self._status, self._notes, 1 if height < LOW else 2, self._over)
        whole.split_column(
            Layout(head, size=3 if height < LOW else 4),
            Layout(self._middle(width, height - (4 if height < LOW else 6), height < LOW, cut)),
            Layout(foot, size=1 if height < LOW else 2),
        )
        with_height = options.update(height=height)
        yield from console.render(whole, with_height)

    def _middle(self, width: int, height: int, compact: bool, cut: Overflow) -> RenderableType:
        status = self._status
        if compact or width < NARROW:
            return self._compact(width, height)
        if not status.validations and status.last is None:
            return self._ahead()
        return self._wide(width, height, cut) if width >= WIDE else self._narrow(width, height, cut)

    def _ahead(self) -> RenderableType:
        """Before the first figures: how long each part is predicted to take."""
        outlook = self._status.pace.outlook
        if not (outlook and outlook.seconds):
            return GAP
        times = [(name, duration(seconds)) for name, seconds in outlook.parts.items()]
        return Group(Text("predicted", "bold"), _grid(times, TABLE))

    def _compact(self, width: int, height: int) -> RenderableType:
        if self._status.last is None:
            return GAP
        figures = Columns([Text.assemble((f"{n} ", "dim"), (v, "bold")) for n, v in self._figures()], padding=(0, 3))
        rows = 2 if width >= NARROW else 4
        middle = Layout()
        middle.split_column(Layout(figures, size=rows), Layout(self._loss()))
        return middle if height - rows >= 5 else figures

    def _narrow(self, width: int, height: int, cut: Overflow) -> Layout:
        """The chart beside the figures; the epochs beside the samples."""
        epochs = min(len(self._status.validations), max(3, height // 3 - 2))
        below = epochs + HEADINGS
        upper, lower, middle = Layout(), Layout(), Layout()
        figures = Layout(_grid(self._figures(), FIGURES), size=FIGURES)
        upper.split_row(Layout(self._loss()), Layout(GAP, size=2), figures)
        table = _epochs(list(self._status.validations), epochs)
        lower.split_row(Layout(table, size=SIDE), Layout(Answers(self._status, cut)))
        middle.split_column(Layout(upper), Layout(lower, size=below))
        return middle

    def _wide(self, width: int, height: int, cut: Overflow) -> Layout:
        """Charts on the left, figures over epochs on the right; the samples where there is room."""
        left, right, middle = Layout(), Layout(), Layout()
        figures, validations = self._figures(), list(self._status.validations)
        epochs = min(len(validations), max(height - len(figures) - HEADINGS - 1, 2)) + HEADINGS
        free = height - len(figures) - 1 - epochs - 1
        beside = self._status.samples is not None and free >= ANSWERS  # under the epochs
        answers = ANSWERS if self._status.samples and not beside else 0
        charts: list[Layout] = [Layout(self._loss(), ratio=3)]
        if self._accuracies() and height - answers >= 20:
            charts += [Layout(GAP, size=1), Layout(self._accuracy(), ratio=2)]
        if answers:
            charts += [Layout(GAP, size=1), Layout(Answers(self._status, cut), size=answers)]
        left.split_column(*charts)
        table = _epochs(validations, epochs - HEADINGS)
        last = Layout(Answers(self._status, cut)) if beside else Layout(GAP)
        right.split_column(Layout(_grid(figures, TABLE), size=len(figures) + 1), Layout(table, size=epochs + 1), last)
        middle.split_row(Layout(left), Layout(GAP, size=2), Layout(right, size=max(SIDE, width // 4)))
        return middle

    def _loss(self) -> Chart:
        losses = list(self._status.losses)
        mean: Iterable[float] = smooth([y for _, y in losses], [1.0] * len(losses)) if losses else ()
        trained = [(x, float(y)) for (x, _), y in zip(losses, mean, strict=True)]
        valid = [(validated.step, validated.loss) for validated in list(self._status.validations)]
        # The later curve hides the earlier one where they meet; marks are above both.
        curves = [Curve("validation", valid, _VALID, marked=True), Curve("training", trained, _TRAINED)]
        return Chart("loss", curves, self._status.steps)

    def _accuracies(self) -> list[tuple[float, float]]:
        return [(one.step, one.accuracy) for one in list(self._status.validations) if one.accuracy is not None]

    def _accuracy(self) -> Chart:
        shown = [Level(name, value) for name, value in self._levels()]
        curve = Curve("validation", self._accuracies(), _VALID, marked=True)
        return Chart("accuracy", [curve], self._status.steps, shown, percent=True)

    def _levels(self) -> list[tuple[str, float]]:
        """(name, accuracy) of what needs no training."""
        outlook = self._status.pace.outlook
        named = (("majority", outlook.majority), ("chance", outlook.chance)) if outlook else ()
        return [(name, value) for name, value in named if value is not None]

    def _figures(self) -> list[tuple[str, str]]:
        """(name, value) of what is known so far."""
        status, last = self._status, self._status.last
        figures: list[tuple[str, str]] = []
        if last is not None:
            figures += _step(last, status)
        if accuracies := self._accuracies():
            figures.append(("accuracy", f"{accuracies[-1][1]:.1%}"))
            figures += [(name, f"{value:.1%}") for name, value in self._levels()]
        return figures


def _step(last: StepDone, status: Status) -> list[tuple[str, str]]:
    outlook = status.pace.outlook
    there = f" of {amount(outlook.memory)}" if outlook and outlook.memory else ""
    return [
        ("loss", f"{last.loss:.4f}"),
        ("epoch", f"{last.epoch:.2f}"),
        ("lr", f"{last.learning_rate:.2e}"),
        ("grad norm", f"{last.grad_norm:.3g}"),
        ("tokens/s", f"{status.tokens_per_second:,.0f}"),
        ("s/step", f"{last.seconds:.3g}"),
        ("peak memory", f"{amount(status.peak_bytes)}{there}"),
    ]


def _epochs(validations: Sequence[Validated], rows: int) -> RenderableType:
    """So many rows at most: the newest, and the best."""
    if not validations:
        return GAP
    table = epoch_table(validations, None if len(validations) <= rows else max(rows - 1, 1))
    table.title, table.caption = Text.assemble(("validations   ", "bold"), (str(table.caption), "dim")), None
    return table


def _grid(figures: Sequence[tuple[str, str]], width: int) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.width = width
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", justify="right", no_wrap=True)
    for name, value in figures:
        table.add_row(lines(name), lines(value))
    return table
