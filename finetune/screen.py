"""Where a person sees a run go on: standard error, live on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console

from finetune.events import Event
from finetune.report.live_screen import LiveScreen
from finetune.report.screen import PlainScreen


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
