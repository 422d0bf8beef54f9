"""Standard output and error that survive a closed pipe and pass no control characters on.

All that is printed goes through here: messages, tracebacks, warnings and the logs of libraries. A run does not end
because `tee` or a terminal did, and a text from a stranger's file does not command the terminal.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from finetune.text import harmless

_GONE = {errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET}  # EIO: a terminal that was closed
_MOVES = re.compile(r"\n*(?:\x1b\[A)*")  # of tqdm, from one bar to another


class _Outliving(io.FileIO):
    """Drops what it is given once nobody can read it any more."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on `sys.stdout` and `sys.stderr` take every line, whether or not it is read. Files stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue  # a caller's own
        if os.name == "nt" or stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            continue
        stream.flush()
        outliving = io.TextIOWrapper(
            io.BufferedWriter(_Outliving(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, outliving)


class Guarded:
    """A text stream that writes out what a terminal would obey."""

    def __init__(self, stream: IO[str]) -> None:
        self.beneath = stream

    def write(self, text: str) -> int:
        self.beneath.write(harmless(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # a way around
            raise AttributeError(name)
        return getattr(self.beneath, name)


class _Bars(Guarded):
    """Lets the progress bars of a library write over themselves: a line begun anew, and moves between such lines."""

    def write(self, text: str) -> int:
        if _MOVES.fullmatch(text):
            self.beneath.write(text)
        else:
            anew = text.startswith("\r")
            self.beneath.write("\r" * anew + harmless(text[anew:]))
        return len(text)


@contextmanager
def showing_bars() -> Iterator[None]:
    """Inside, libraries may show progress bars on standard error."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _Bars(unguarded(before)))
    try:
        yield
    finally:
        sys.stderr = before


class _Record(logging.LogRecord):
    """What a library says may hold a value from a stranger's file: only its first line begins at the left."""

    def getMessage(self) -> str:
        return _set_in(super().getMessage())


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{_set_in(f'{category.__name__}: {message}')} ({filename}:{lineno})\n"


def _set_in(text: str) -> str:
    return text.replace("\n", "\n  ")


def guard() -> None:
    """From now on what is written to `sys.stdout` and `sys.stderr` cannot command a terminal, and what libraries log or
    warn of begins one line.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Guarded):
            setattr(sys, name, cast(TextIO, Guarded(stream)))


def unguarded(stream: IO[str]) -> IO[str]:
    """The stream beneath, for control characters of our own."""
    return stream.beneath if isinstance(stream, Guarded) else stream
