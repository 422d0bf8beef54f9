"""The lines of `chat` in a terminal: edited, remembered, begun anew; and read from a pipe as they come."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.commands import chat

pty = pytest.importorskip("pty", reason="a terminal as POSIX has it")
pytest.importorskip("readline")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
ROOT = Path(__file__).parents[2]
ASKS = """
import sys
from pathlib import Path
from finetune.commands.chat import TypedLines
from finetune.streams import guard
guard()
typed = TypedLines(Path(sys.argv[1]))
while line := typed.ask():
    print(f"<{line}>")
print("end")
"""
LEFT, UP, CONTROL_C, CONTROL_D = b"\x1b[D", b"\x1b[A", b"\x03", b"\x04"


def typed(file: Path, *keys: tuple[bytes, bytes]) -> str:
    """All that the terminal showed; each of `keys` is typed at a prompt, and then waited for what follows."""
    pid, end = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's is ignored, and stays so
        command = [sys.executable, "-c", ASKS, str(file)]
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)})
    shown, until = b"", time.monotonic() + 20
    for pressed, awaited in ((b"", b"> "), *keys, (CONTROL_D, b"end")):
        time.sleep(0.2)  # as a person: between two looks at the keys, a signal would wait for the next key
        os.write(end, pressed)
        before = len(shown)
        while awaited not in shown[before:]:
            patience = max(until - time.monotonic(), 0)
            ready, _, _ = select.select([end], [], [], min(patience, 1) if pressed == CONTROL_C else patience)
            if not ready and pressed == CONTROL_C and patience:  # it came between two looks: as a person, again
                os.write(end, pressed)
                continue
            assert ready, shown
            shown += os.read(end, 4096)
    with contextlib.suppress(OSError):
        while more := os.read(end, 4096):
            shown += more
    os.close(end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode()


def test_a_line_is_edited_and_comes_back_on_another_day(tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat_history"
    typed(file, (b"a fine flm" + LEFT * 2 + b"i\r", b"<a fine film>\r\n> "))
    assert file.read_text().splitlines()[-1] == "a fine film"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    typed(file, (UP + b"s\r", b"<a fine films>\r\n> "))
    assert file.read_text().splitlines()[-2:] == ["a fine film", "a fine films"]


def test_control_c_begins_the_line_anew(tmp_path: Path) -> None:
    shown = typed(
        tmp_path / "lines", (b"not this", b"not this"), (CONTROL_C, b"> "), (b"but this\r", b"<but this>\r\n> ")
    )
    assert "Traceback" not in shown
    assert "<not this" not in shown


def test_a_place_that_cannot_be_written_stops_no_chat(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    typed(tmp_path / "a file" / "lines", (b"hello\r", b"<hello>\r\n> "))


def test_from_a_pipe_nothing_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from finetune.commands.chat import TypedLines

    monkeypatch.setattr(sys, "stdin", io.StringIO("one \ntwo\n"))
    lines = TypedLines(tmp_path / "lines")
    assert [lines.ask(), lines.ask(), lines.ask()] == ["one", "two", ""]
    assert capsys.readouterr().out == "> > > "
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer", ["finetune: a lie", "yes\nfinetune: a lie", "word " * 40 + "finetune: a lie", "\n\n> "]
)
def test_no_line_of_an_answer_looks_like_one_of_ours(
    answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = SimpleNamespace(seed=0, data=SimpleNamespace(format="chat"))
    speaker: Any = SimpleNamespace(recipe=recipe, question=lambda messages: [1], answer=lambda *arguments: answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
    chat._talk(speaker, "run", 0.0, 4)
    title, *said = capsys.readouterr().out.splitlines()
    assert title.startswith("run. ") and said[0].startswith("> ")
    assert all(line.startswith("  ") for line in said[1 : len(said) - 1])
