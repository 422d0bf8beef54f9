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

import numpy as np
import pytest
from rich.console import Console as RichConsole
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from backends.interface import BackendError, IncompatibleState
from finetune.console import Console, lines, plain_page
from finetune.data.rows import Example
from finetune.errors import DataError, explain
from finetune.report.row_tokens import highlighted
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


FORGED = "a label\nverdict: better"


def began(shown: str) -> bool:
    """Whether the forged line begins one, at the left or in a cell."""
    return any(line.strip("│┃").removeprefix(" ").startswith("verdict") for line in OURS.sub("", shown).splitlines())


VALUES: dict[str, Callable[[Console], object]] = {
    "a sentence": lambda console: console.print(f"the {FORGED} is rare"),
    "a cell": lambda console: console.print(_cells(FORGED)),
    "lines": lambda console: console.print(lines("first", FORGED, style="bold")),
    "a title": lambda console: console.rule(FORGED),
    "several": lambda console: console.print("a", FORGED, 3),
    **{f"a sentence after {n} words": (lambda console, n=n: console.print(
        lines(f"{'word ' * n}{FORGED}", style="bold"))) for n in range(15, 21)},
    **{f"a cell after {n} words": (lambda console, n=n: console.print(
        _cells(f"{'word ' * n}{FORGED}"))) for n in range(15, 21)},
    **{f"a grid's cell after {n} words": (lambda console, n=n: console.print(
        _grid(f"{'word ' * n}{FORGED}"))) for n in range(15, 21)},
    **{f"a long value after {n}": (lambda console, n=n: console.print(
        "w" * n + f" verdict: better{FORGED}")) for n in (85, 92, 97, 100, 195)},
}  # fmt: skip


def _cells(text: str) -> Table:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    return table


def _grid(text: str) -> Table:
    table = Table.grid()
    table.add_row(text)
    return table


@pytest.mark.parametrize("length", range(70, 82))
def test_a_terminal_does_not_fold_a_line_where_a_value_could_begin_one(length: int) -> None:
    file = Terminal()
    console = Console(file=file, width=80, color_system=None, force_terminal=True)
    console.print("w" * length + f" {FORGED}", soft_wrap=True)
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(line.startswith("verdict") for line in shown.splitlines())
    assert plain_page(lambda page: page.print("w" * length + " x" * 40, soft_wrap=True)).count("\n") == 1, "whole"


@pytest.mark.parametrize("text", [
    "verdict: better", "verdict: better " * 30, "w" * 78 + " verdict: better", "word " * 16 + "verdict: better",
])  # fmt: skip
def test_the_text_of_a_row_is_set_in(text: str) -> None:
    class Words:
        decode = staticmethod(lambda tokens: "".join(f"{words[token]} " for token in tokens))

    words = text.split(" ")
    tokens = np.arange(len(words), dtype=np.int32)
    row = Example(tokens, np.zeros(len(words), np.float32), "a:1", "", text, len(words), len(words))
    page = plain_page(lambda console: console.print(highlighted(row, Words())))
    assert "verdict" in page
    assert all(line.startswith("  ") for line in page.splitlines())


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_begins_no_line(kind: str) -> None:
    page = plain_page(VALUES[kind])
    assert "verdict: better" in " ".join(page.split())
    assert not began(page)


def test_our_own_lines_stay() -> None:
    assert plain_page(lambda console: console.print(lines("a", "b\nc"))) == "a\nb\\nc\n"
    assert str(DataError("a", "b\nc")) == "a\nb\\nc"


@pytest.mark.parametrize("error", [
    DataError(FORGED), BackendError(FORGED), IncompatibleState(FORGED), OSError(2, "no such file", FORGED),
    type("PanicException", (BaseException,), {})(FORGED),
])  # fmt: skip
def test_no_value_in_an_error_begins_a_line(error: BaseException) -> None:
    message, _ = explain(error) or ("", 0)
    assert r"\nverdict: better" in message
    assert not began(message)


def test_a_librarys_log_and_warning_begin_one_line_at_the_left() -> None:
    with guarded() as screen:
        logging.getLogger("of a library").warning("the kind %s", FORGED)
        sys.stderr.write(warnings.formatwarning(FORGED, UserWarning, "file.py", 1))
    assert not any(line.startswith("verdict") for line in screen.getvalue().splitlines())
    assert "a label\n  verdict" in screen.getvalue()


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
    """Only `finetune.console` has a console of rich, and only it and `finetune.terminal` reach beneath the guard."""
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
        ("terminal.py", "unguarded"),  # leaves a page of its own, shows the cursor again
        ("streams.py", "beneath"),
        ("template_child.py", "buffer"),  # the pipes of a child
    }
