"""The screen that suits where a person looks: on a terminal a few lines that stay in place while the run goes on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from finetune.events import Event, Progress, RunStarted, StepDone
from finetune.report.plot import sparkline
from finetune.report.screen import PlainScreen, Status, note_line
from finetune.report.tables import epoch_table
from finetune.text import amount, duration

REFRESH = 0.1  # seconds between two frames
CHROME = 15  # lines of a frame that are not the newest epochs, where the terminal is 40 columns wide


class Curve:
    """The loss so far as one line of blocks, as wide as there is room for."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = losses

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._losses and not options.ascii_only:
            yield Text(sparkline(self._losses, min(options.max_width, 80)), "cyan", no_wrap=True, overflow="crop")


class LiveScreen:
    """Redraws on every event, at most ten times a second; leaves the last frame when the run fails."""

    def __init__(self, console: Console) -> None:
        self._status = Status()
        self._notes: list[str] = []
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._console = console
        self._drawn = 0.0
        self._live = Live(console=console, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> LiveScreen:
        self._live.start(refresh=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._frame(), refresh=False)
        self._live.transient = error is None  # the report that follows has the same table
        self._live.stop()

    def handle(self, event: Event) -> None:
        self._status.note(event)
        often = isinstance(event, StepDone | Progress)
        if isinstance(event, Progress) and event.total:
            self._bar(event.what, event.done, event.total)
        elif isinstance(event, Progress):
            self._say(event.what)
        elif isinstance(event, RunStarted | StepDone):
            self._bar("training", event.step, self._status.steps)
        elif (note := note_line(event)) is not None:
            self._say(note)
        if not often or time.monotonic() - self._drawn >= REFRESH:
            self._drawn = time.monotonic()
            self._live.update(self._frame(), refresh=not often)

    def _bar(self, what: str, done: int, total: int) -> None:
        """The bar of the work in hand; the bars of other work that is done disappear."""
        for name in [name for name in self._tasks if name not in (what, "training")]:
            self._bars.remove_task(self._tasks.pop(name))
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def _say(self, text: str) -> None:
        self._notes = [*self._notes, text][-2:]

    def _frame(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars]
        if self._status.last is not None:
            parts += [Columns(self._figures(self._status.last), padding=(0, 3)), Curve(list(self._status.losses))]
        if self._status.validations:
            room = max(3, self._console.size.height - CHROME)
            parts += [Text(), epoch_table(self._status.validations, newest=room)]
        return Group(*parts, *(Text(note, "dim", no_wrap=True, overflow="ellipsis") for note in self._notes))

    def _figures(self, last: StepDone) -> list[RenderableType]:
        figures = {
            "loss": f"{last.loss:.4f}",
            "ETA": duration(self._status.seconds_left),
            "epoch": f"{last.epoch:.2f}",
            "lr": f"{last.learning_rate:.2e}",
            "grad norm": f"{last.grad_norm:.3g}",
            "tokens/s": f"{self._status.tokens_per_second:,.0f}",
            "memory": amount(last.peak_bytes),
        }
        return [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in figures.items()]


class Screen(Protocol):
    """A sink of events, and a context manager around the run."""

    def handle(self, event: Event) -> None: ...

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(console: Console | None = None) -> Screen:
    """The screen that suits the console (standard error unless given). NO_COLOR is rich's to honour."""
    console = console or Console(stderr=True)
    return LiveScreen(console) if console.is_interactive else PlainScreen(console)
