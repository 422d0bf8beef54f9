"""Texts for people: on one line, without what a terminal would obey, and figures in the units that people use."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only needs words needs no screen
    from rich.console import Console

_COMMANDS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def harmless(text: str) -> str:
    """The text without what a terminal would obey: control characters, changes of direction; as long as before."""
    return text if text.isprintable() else _COMMANDS.sub("?", text)


def plain_page(show: Callable[[Console], None]) -> str:
    """What `show` prints, as a page without colour, 100 columns wide."""
    from rich.console import Console

    page = io.StringIO()
    show(Console(file=page, width=100, color_system=None, force_terminal=False, legacy_windows=False))
    return page.getvalue()


def shorten(text: str, length: int) -> str:
    """On one line, without control characters; the middle gives way."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(line) <= length:
        return line
    head = (length - 4) // 2
    return f"{line[:head]} ... {line[len(line) - (length - 5 - head) :]}"


def duration(seconds: float | None) -> str:
    """`1:02:03`; `-:--:--` for None."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def amount(count: float) -> str:
    """Bytes as people say them: `1.4 GB` (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
