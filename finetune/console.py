"""The console of all pages and tables: texts are shown as they are, never obeyed, and never read as markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from io import StringIO
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Span, Text
from typer import rich_utils

from finetune.streams import unguarded
from finetune.text import COMMANDS, harmless, one_line


class Console(RichConsole):
    """Colours and moves of the cursor are rich's own and reach the terminal; those in a text are written out.

    A str is one line, whatever values it holds: a line break in it is written out. What has several lines is made by
    `lines`. The console's file is the stream beneath `streams.Guarded`, which would write out what is rich's own too.
    """

    def __init__(self, *, markup: bool = False, emoji: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, emoji=emoji, **options)
        self._written = harmless if markup else one_line  # markup: texts of ours and of typer's

    @property
    def file(self) -> IO[str]:
        return unguarded(super().file)

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(self._written(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = _harmless_text(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def lines(*parts: str, style: str = "", **options: Any) -> Text:
    """Each part on a line of its own, and no more lines than parts."""
    return Text("\n".join(map(one_line, parts)), style, **options)


class Sentence:
    """A text that begins one line at the left: where it is too long for one, the next are set in, so that no value in
    it begins a line there.
    """

    def __init__(self, text: str, style: str = "") -> None:
        self._text = lines(text, style=style)

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterable[Text]:
        wrapped = self._text.wrap(console, max(options.max_width - 2, 20))
        for line in wrapped:
            line.rstrip()
        yield Text("\n  ").join(wrapped)


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
    vars(rich_utils)["Console"] = partial(Console, markup=True)  # its own texts are markup


def plain_page(show: Callable[[Console], None]) -> str:
    """The page that `show` prints, without colour, 100 columns wide."""
    page = StringIO()
    show(Console(file=page, width=100, color_system=None, force_terminal=False, legacy_windows=False))
    return page.getvalue()
