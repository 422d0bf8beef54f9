"""No text commands the terminal: everything that prints goes through a stream or a console that writes it out."""

from __future__ import annotations

import ast
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from finetune.console import Console, plain_page
from finetune.streams import Guarded, guard, showing_bars
from finetune.text import harmless

POISON = "\x1b]0;pwned\x07\x9d0;pwned\x9c\u202e\u2066\u2028\x08\r\x7f\ud83d[red]mark[/red][/nothing]"
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r(?=\x1b\[|\n|$)")  # colours and moves of rich's own
ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def obeyed(text: str) -> set[str]:
    """The characters that a terminal would obey, but for rich's own."""
    return {char for char in OURS.sub("", text) if harmless(char) != char}


@pytest.mark.parametrize("char", [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x202A, 0x2069, 0xDC80)])
def test_every_control_character_is_written_out(char: str) -> None:
    kept = char in "\t\n"
    assert harmless(f"a{char}b") == f"a{char if kept else char.encode('unicode_escape').decode()}b"


def test_other_texts_stay_as_they_are() -> None:
    for text in ("naïve 日本 🦊 👩‍👩‍👧 שלום مرحبا", "a\tb\nc", "", r"\x1b"):
        assert harmless(text) == text


def _table() -> Table:
    table = Table("a", POISON, title=POISON, caption=POISON)
    table.add_column(Text(POISON))
    table.add_row(POISON, Text(f"x{POISON}y", "bold red"), Panel(POISON))
    return table


SHOWN: dict[str, Callable[[Console], object]] = {
    "text": lambda console: console.print(POISON, style="bold"),
    "assembled": lambda console: console.print(Text.assemble(("a", "red"), POISON, ("b", "blue"))),
    "table": lambda console: console.print(_table()),
    "rule": lambda console: console.rule(POISON),
    "soft wrap": lambda console: console.print(POISON, soft_wrap=True),
    "several": lambda console: console.print("a", POISON, 3, [POISON]),
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_obeys_no_text(kind: str, terminal: bool) -> None:
    file = Terminal() if terminal else io.StringIO()
    SHOWN[kind](Console(file=Guarded(file), width=300, height=20, force_terminal=terminal))
    assert not obeyed(file.getvalue())
    shown = OURS.sub("", file.getvalue())
    assert r"\x1b]0;pwned" in shown
    assert "[red]mark[/red][/nothing]" in shown
    assert ("\x1b" in file.getvalue()) <= terminal


def test_styles_stay_where_they_were() -> None:
    file = Terminal()
    console = Console(file=file, width=80, color_system="truecolor", force_terminal=True)
    console.print(Text.assemble(("a", "red"), "\u202e", ("b\x9dc", "blue")))
    shown = file.getvalue().replace("\x1b[0m\x1b[34m", "")  # blue goes on
    assert shown == "\x1b[31ma\x1b[0m\\u202e\x1b[34mb\\x9dc\x1b[0m\n"


@pytest.mark.parametrize("kind", SHOWN)
def test_a_page_obeys_no_text(kind: str) -> None:
    assert not obeyed(plain_page(SHOWN[kind]))


def _warned() -> None:
    sys.stderr.write(warnings.formatwarning(POISON, UserWarning, "file.py", 1))


def _logged() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.emit(logging.LogRecord("library", logging.WARNING, "file.py", 1, POISON, None, None))


PRINTED: dict[str, Callable[[], object]] = {
    "print": lambda: print(POISON),
    "error": lambda: print("finetune:", POISON, file=sys.stderr),
    "warning": _warned,
    "log": _logged,
    "traceback": lambda: sys.excepthook(ValueError, ValueError(POISON), None),
    "a library's console": lambda: RichConsole(markup=False).print(POISON),
    "lines": lambda: sys.stdout.writelines([POISON, "\n"]),
}


@contextmanager
def guarded() -> Iterator[Terminal]:
    """Standard output and standard error of a terminal, guarded as the command line guards them."""
    terminal = Terminal()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        guard()
        yield terminal


@pytest.mark.parametrize("kind", PRINTED)
@pytest.mark.parametrize("live", [True, False])
def test_nothing_that_is_printed_is_obeyed(kind: str, live: bool) -> None:
    with guarded() as screen:
        console = Console(stderr=True, width=300, force_terminal=True)
        with Live(console=console) if live else nullcontext():
            guard()
            PRINTED[kind]()
    assert not obeyed(screen.getvalue())
    assert "pwned" in screen.getvalue()


def test_progress_bars_of_a_library_write_over_themselves() -> None:
    from tqdm import tqdm

    with guarded() as screen:
        with showing_bars():
            first, second = tqdm(total=2, desc=f"a{POISON}", ncols=200), tqdm(total=2, desc="b", ncols=80, position=1)
            first.update(2)
            second.update(1)
            second.close()
            first.close()
            print(f"x{POISON}", file=sys.stderr)
        print("\x1b[A", file=sys.stderr)
    shown = screen.getvalue()
    assert not obeyed(shown.replace("\r", ""))
    for expected in ("\ra" + r"\x1b]0;pwned", "\x1b[A", r"x\x1b]0;pwned"):
        assert expected in shown
    assert shown.endswith("\\x1b[A\n")  # what is printed otherwise moves nothing


def test_a_bypass_is_seen() -> None:
    """The checks above can fail: what is written beneath the guard is found."""
    with guarded() as screen:
        stream = sys.stdout
        assert isinstance(stream, Guarded)
        stream.beneath.write(POISON.replace("\ud83d", ""))
    assert {"\x1b", "\x9d", "\u202e"} <= obeyed(screen.getvalue())


def test_no_module_prints_past_the_guard() -> None:
    """Only `finetune.console` has a console of rich, and only it and the supervisor reach beneath the guard."""
    found = set()
    for file in sorted((ROOT / "finetune").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console", "finetune.streams"):
                found |= {(file.name, alias.name) for alias in node.names}
            if isinstance(node, ast.Attribute) and node.attr in ("__stdout__", "__stderr__", "beneath", "buffer"):
                found.add((file.name, node.attr))
    past = {"Console", "print", "get_console", "unguarded", "__stdout__", "__stderr__", "beneath", "buffer"}
    assert {one for one in found if one[1] in past} == {
        ("console.py", "Console"),
        ("console.py", "unguarded"),
        ("supervisor.py", "unguarded"),  # shows the cursor again
        ("streams.py", "beneath"),
        ("template_child.py", "buffer"),  # the pipes of a child
    }
