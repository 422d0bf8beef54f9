"""The screen of a run: on a terminal a few lines that stay in place; elsewhere the plain screen."""

from __future__ import annotations

import time
from collections.abc import Generator
from types import TracebackType
from typing import Any, Literal, Protocol

from rich.columns import Columns
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from finetune.console import Console, lines
from finetune.events import Event, Progress, Result, RunStarted, StepDone, Work
from finetune.report.plot import sparkline
from finetune.report.screen import PlainScreen, Status, sentence
from finetune.report.tables import epoch_table
from finetune.streams import guard
from finetune.text import amount, duration

REFRESH = 0.1  # seconds between two frames
CHROME = 15  # lines of a frame beside the newest epochs, on a terminal 40 columns wide


class Curve:
    """The loss so far as one line of blocks, as wide as the terminal allows."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = losses

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        if self._losses and not options.ascii_only:
            yield Text(sparkline(self._losses, min(options.max_width, 80)), "cyan", no_wrap=True, overflow="crop")


class LiveScreen:
    """Redraws on every event, at most ten times per second; leaves the last frame on the screen when the run fails."""

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
        guard()  # what is printed meanwhile goes through rich, which would read its colours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._frame(), refresh=False)
        self._live.transient = error is None  # the report that follows has the same table
        self._live.stop()

    def show(self, event: Event) -> None:
        self._status.update(event)
        often = isinstance(event, StepDone | Progress)
        if isinstance(event, Progress):
            self._bar(event.what, event.done, event.total)
        elif isinstance(event, RunStarted | StepDone):
            self._bar("training", event.step, self._status.steps)
        elif (text := sentence(event)) is not None:
            self._notes = [*self._notes, text][-2:]
        if not often or time.monotonic() - self._drawn >= REFRESH:
            self._drawn = time.monotonic()
            self._live.update(self._frame(), refresh=not often)

    def _bar(self, what: str, done: int, total: int) -> None:
        """Moves the bar of the present work, and removes the bars of earlier work."""
        for name in [name for name in self._tasks if name not in (what, "training")]:
            self._bars.remove_task(self._tasks.pop(name))
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def _frame(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars]
        if self._status.last is not None:
            parts += [Columns(self._figures(self._status.last), padding=(0, 3)), Curve(list(self._status.losses))]
        if self._status.validations:
            newest = max(3, self._console.size.height - CHROME)
            parts += [Text(), epoch_table(self._status.validations, newest)]
        # The ellipsis of rich is a character that a terminal without Unicode cannot show.
        overflow: Literal["crop", "ellipsis"] = "crop" if self._console.options.ascii_only else "ellipsis"
        return Group(*parts, *(lines(note, style="dim", no_wrap=True, overflow=overflow) for note in self._notes))

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
    """Shows events; a context manager around the run."""

    def show(self, event: Event) -> None: ...

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(console: Console | None = None) -> Screen:
    """The screen that suits the console; its default is standard error. Rich honours NO_COLOR."""
    console = console or Console(stderr=True)
    return LiveScreen(console) if console.is_interactive else PlainScreen(console)


def with_progress(events: Generator[Event, None, Result]) -> Result:
    """What the work returns, its progress on the screen while it goes on."""
    work = Work(events)
    with open_screen() as screen:
        for event in work:
            screen.show(event)
    return work.result
