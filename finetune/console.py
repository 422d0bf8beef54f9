"""The console for all tables and messages: text from data or models is never read as markup or control codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from io import StringIO
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, OverflowMethod, RenderableType
from rich.segment import Segment
from rich.text import Span, Text

from finetune.streams import unguarded
from finetune.text import COMMANDS, harmless, one_line

_NARROW = 24  # columns; a narrower place holds no sentence


class Console(RichConsole):
    """Colours and moves of the cursor are rich's own and reach the terminal; those in a text are written out.

    A str is one line, whatever values it holds: a line break in it is written out. What has several lines is made by
    `lines`. Where a line is folded, the rest of it is set in. The console's file is the stream beneath
    `streams.Guarded`, which would write out what is rich's own too.
    """

    def __init__(self, *, markup: bool = False, emoji: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, emoji=emoji, **options)
        asked = {"force_terminal", "force_interactive"} & options.keys() or "TTY_INTERACTIVE" in os.environ
        if not asked and not self.file.isatty():
            self.is_interactive = False  # FORCE_COLOR asks a log for colours, and not for moves of the cursor
        self._written = harmless if markup else one_line  # markup: texts of ours and of typer's

    @property
    def file(self) -> IO[str]:
        return unguarded(super().file)

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(self._written(text), **options)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """soft_wrap: a line stays whole. But on a terminal, which would fold it at its edge, whatever begins there."""
        super().print(*objects, soft_wrap=bool(soft_wrap) and not self.is_terminal, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = _set_in(_harmless_text(renderable), self, options or self.options)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def lines(*parts: str, style: str = "", **options: Any) -> Text:
    """Each part on a line of its own, and no more lines than parts."""
    return Text("\n".join(map(one_line, parts)), style, **options)


def _set_in(text: Text, console: RichConsole, options: ConsoleOptions) -> Text:
    """The text, with each of its lines that is too long folded, and what follows in it two columns further in: no value
    in a line begins one at the left. Columns that are too narrow for a sentence fold as they are.
    """
    width = options.max_width
    if options.no_wrap or text.no_wrap or width < _NARROW or all(cell_len(line) <= width for line in _lines(text)):
        return text
    overflow = text.overflow or options.overflow
    folded = Text("\n").join(_folded(line, console, width, overflow) for line in text.split("\n", allow_blank=True))
    folded.justify, folded.overflow, folded.end = text.justify, text.overflow, text.end
    return folded


def _lines(text: Text) -> list[str]:
    return text.plain.split("\n")


def _folded(line: Text, console: RichConsole, width: int, overflow: OverflowMethod | None) -> Text:
    if cell_len(line.plain) <= width:
        return line
    parts = line.wrap(console, width - 2, overflow=overflow)
    for part in parts:
        part.rstrip()
    return Text("\n  ").join(parts)


def _harmless_text(text: Text) -> Text:
    """The same styles, and each control character written out."""
    if not COMMANDS.search(text.plain):
        return text
    ends = [end for match in COMMANDS.finditer(text.plain) for end in match.span()]
    pieces = list(text.divide(ends))
    for piece in pieces:
        written = harmless(piece.plain)
        if written != piece.plain:
            styles = {span.style: None for span in piece.spans}
            piece.plain = written
            piece.spans = [Span(0, len(written), style) for style in styles]
    whole = text.blank_copy()
    for piece in pieces:
        whole.append_text(piece)
    return whole


def colour_help() -> None:
    """For typer, whose help and errors in the arguments come in colour from a console of its own."""
    from typer import rich_utils  # a tenth of a second, for help alone

    vars(rich_utils)["Console"] = partial(Console, markup=True)  # its own texts are markup


def plain_page(show: Callable[[Console], None]) -> str:
    """The page that `show` prints, without colour, 100 columns wide."""
    page = StringIO()
    show(Console(file=page, width=100, color_system=None, force_terminal=False, legacy_windows=False))
    return page.getvalue()
