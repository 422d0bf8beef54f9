"""The screen of a run: full-screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from finetune.console import Console, lines
from finetune.events import Event, Note, Outlook, Progress, Result, Samples, StepDone, Work
from finetune.report.live_frame import Frame
from finetune.report.screen import PlainScreen, Status, sentence
from finetune.streams import guard
from finetune.supervisor import announce_page
from finetune.terminal import HeldOutput, silent_keys
from finetune.text import shorten

FRAMES = 1  # per second; a frame of a large window takes some 30 ms of a processor, which training needs
STILL = 16  # lines of the frame that stays after a failure
STOPPING = "stopping after this step; press Ctrl-C again to stop at once"


class StopHeard(Protocol):
    """Whoever hears the signals that ask a run to stop."""

    quiet: bool  # whether it says nothing itself

    @property
    def stopping(self) -> bool: ...


@contextmanager
def _quiet(stop: StopHeard | None) -> Iterator[None]:
    """Inside, the screen alone writes: keys are not echoed, and who hears the signals says nothing."""
    if stop:
        stop.quiet = True
    try:
        with silent_keys():
            yield
    finally:
        if stop:
            stop.quiet = False


class LiveScreen:
    """A page of its own beside what the terminal showed before: whatever is typed, printed or resized meanwhile, the
    terminal is as it was at the end. After a failure the last frame is printed there.
    """

    def __init__(self, console: Console, stop: StopHeard | None = None) -> None:
        self._status = Status()
        self._notes: list[str] = []
        self._console, self._stop = console, stop
        self._held, self._over = ExitStack(), False
        self._output = HeldOutput()
        self._live = Live(
            console=console,
            screen=True,
            get_renderable=self._frame,
            refresh_per_second=FRAMES,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> LiveScreen:
        self._held.enter_context(_quiet(self._stop))
        self._held.enter_context(self._output)
        announce_page(True)
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._live.refresh()  # an empty page: a terminal that has only one keeps nothing of it
        self._live.stop()
        announce_page(False)
        self._held.close()
        if error is not None and (self._status.last or self._status.validations):
            still = min(STILL, self._console.size.height - 1)
            self._console.print(Frame(self._status, self._notes, still, over=True))
        self._output.release()

    def show(self, event: Event) -> None:
        self._status.update(event)
        if isinstance(event, StepDone | Progress | Outlook | Samples):
            return  # with the next frame
        if (text := sentence(event)) is not None:
            self._notes = [text]
        self._live.refresh()

    def _frame(self) -> RenderableType:
        if self._over:
            return Text()
        notes = [*self._notes, *self._output.last_line()][-1:]
        stopping = [STOPPING] if self._stop and self._stop.stopping else []
        return Frame(self._status, [*(notes or [""] * len(stopping)), *stopping])


class BarScreen:
    """One line for the work in hand, of which nothing stays."""

    def __init__(self, console: Console, stop: StopHeard | None = None) -> None:
        self._stop = stop
        self._held = ExitStack()
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> BarScreen:
        self._held.enter_context(_quiet(self._stop))
        self._bars.start()
        guard()  # what is printed meanwhile goes through rich, which would read its colours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._held.close()

    def show(self, event: Event) -> None:
        if isinstance(event, Note):
            self._bars.console.print(lines(event.text, style="dim"), soft_wrap=True)
        if not isinstance(event, Progress):
            return
        if event.what != self._what:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task, self._what = self._bars.add_task(shorten(event.what, 40), total=event.total), event.what
        if self._task is not None:
            stopping = self._stop is not None and self._stop.stopping
            described = "stopping" if stopping else shorten(event.what, 40)
            self._bars.update(self._task, description=described, completed=event.done, total=event.total)


class Screen(Protocol):
    """Shows events; a context manager around the work."""

    def show(self, event: Event) -> None: ...

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(console: Console | None = None, stop: StopHeard | None = None) -> Screen:
    """The screen of a run that suits the console; its default is standard error. Rich honours NO_COLOR."""
    console = console or Console(stderr=True)
    return LiveScreen(console, stop) if console.is_interactive else PlainScreen(console)


def with_progress(events: Generator[Event, None, Result], stop: StopHeard | None = None) -> Result:
    """What the work returns, its progress on the screen while it goes on."""
    work, console = Work(events), Console(stderr=True)
    with BarScreen(console, stop) if console.is_interactive else PlainScreen(console) as screen:
        for event in work:
            screen.show(event)
    return work.result
