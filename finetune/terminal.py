"""The terminal while a run has it: a page of its own, keys that are not echoed, output that waits, a Mac kept awake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from finetune.streams import unguarded

_SHOW_CURSOR, _HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
_ENTER_PAGE, _LEAVE_PAGE = "\x1b[?1049h", "\x1b[?1049l"


def in_background() -> bool:
    """Whether the terminal belongs to another job, such as the shell."""
    try:
        return sys.stderr.isatty() and os.tcgetpgrp(2) != os.getpgrp()
    except (AttributeError, OSError):  # Windows; or not the terminal of this session
        return False


def leave_page(shown: bool = True) -> None:
    """The cursor is shown again, and what was on the terminal before the page where one is `shown`."""
    _write(_LEAVE_PAGE * shown + _SHOW_CURSOR)


def enter_page() -> None:
    _write(_ENTER_PAGE + _HIDE_CURSOR)


def _write(codes: str) -> None:
    print(codes, end="", file=unguarded(sys.stderr), flush=True)


def key_settings() -> list[Any] | None:
    """How the terminal takes keys now; None: standard input is not a terminal, or has no such settings."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    with suppress(AttributeError, OSError, ValueError, termios.error):
        return termios.tcgetattr(sys.stdin.fileno())
    return None


def restore_keys(settings: list[Any] | None) -> None:
    if settings is not None:
        import termios

        with suppress(OSError, ValueError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, settings)


@contextmanager
def silent_keys() -> Iterator[None]:
    """Inside, keys are not echoed; Ctrl-C is a signal as ever."""
    before = key_settings()
    if before is not None:
        import termios

        flags = before[3] & ~(termios.ECHO | termios.ECHONL)
        restore_keys([*before[:3], flags, *before[4:]])
    try:
        yield
    finally:
        restore_keys(before)


class _Held:
    """A text stream of which nothing is shown yet."""

    def __init__(self, stream: IO[str], parts: list[tuple[IO[str], str]]) -> None:
        self.rich_proxied_file, self._parts = stream, parts  # rich's own writing goes to the stream at once

    def write(self, text: str) -> int:
        self._parts.append((self.rich_proxied_file, text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class HeldOutput:
    """Inside, what is written to `sys.stdout` and `sys.stderr` waits where these are terminals; `release` writes it."""

    def __init__(self) -> None:
        self._parts: list[tuple[IO[str], str]] = []

    def __enter__(self) -> HeldOutput:
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (
            cast(TextIO, _Held(stream, self._parts)) if stream is not None and stream.isatty() else stream
            for stream in self._before
        )
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self._before

    def last_line(self) -> list[str]:
        """The last line that was written so far, if there is one."""
        written = "".join(text for _, text in self._parts[-50:]).split("\n")
        return [line.strip() for line in written if line.strip()][-1:]

    def release(self) -> None:
        for stream, text in self._parts:
            stream.write(text)
            stream.flush()
        self._parts.clear()


@contextmanager
def awake(child: int) -> Iterator[None]:
    """Keeps a Mac awake while the child lives; the display may sleep."""
    if sys.platform != "darwin":
        yield
        return
    command, helper = ["caffeinate", "-is", "-w", str(child)], None
    with suppress(OSError):
        helper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        if helper is not None:
            helper.terminate()
            helper.wait()
