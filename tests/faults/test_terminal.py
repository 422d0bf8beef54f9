"""On a terminal: the live screen is the child's, Ctrl-C reaches it once, and a crash gives the cursor back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import PATIENCE, Work, losses
from tests.end_to_end.test_run import RECIPE

pty = pytest.importorskip("pty", reason="a terminal as POSIX has it")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SHOW, HIDE = b"\x1b[?25h", b"\x1b[?25l"
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"  # a page of its own


class Terminal:
    """A command with a terminal of its own as its controlling one."""

    def __init__(self, work: Work, *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if not self.pid:
            os.chdir(work.folder)
            os.execve(sys.executable, [sys.executable, "-m", "finetune", *arguments], work.env | {"TERM": "xterm"})
        self.shown = b""

    def read_until(self, words: bytes) -> None:
        until = time.monotonic() + PATIENCE
        while words not in self.shown:
            assert time.monotonic() < until, self.shown.decode(errors="replace")
            self.shown += os.read(self._end, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def ended(self) -> int:
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while more := os.read(self._end, 4096):
                self.shown += more
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def started(work: Work) -> Terminal:
    terminal = Terminal(work, "train", work.recipe(RECIPE), "--backend", "reference", "train.steps=300")
    terminal.read_until(b"tokens/s")
    assert HIDE in terminal.shown
    return terminal


def test_control_c_stops_after_the_step(work: Work) -> None:
    terminal = started(work)
    time.sleep(0.3)
    terminal.type(b"stray\r")
    terminal.type(b"\x03")
    assert terminal.ended() == 130, terminal.shown
    assert b"stray" not in terminal.shown and b"^C" not in terminal.shown
    assert terminal.shown.count(ENTER) == terminal.shown.count(LEAVE) == 1
    after = terminal.shown[terminal.shown.index(LEAVE) :]
    assert b"ended: after step " in after and after.count(b"ETA") == 1, "the last frame, once"
    assert b"press Ctrl-C again" not in after
    (run,) = work.runs()
    assert f"finetune resume {run.relative_to(work.folder)}".encode() in terminal.shown
    assert terminal.shown.rindex(SHOW) > terminal.shown.rindex(HIDE)
    assert b"Traceback" not in terminal.shown
    assert 0 < len(losses(run)) < 300


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_gives_the_cursor_back(work: Work, number: int) -> None:
    terminal = started(work)
    psutil.Process(terminal.pid).children()[0].send_signal(number)
    assert terminal.ended() == 1
    assert terminal.shown.rindex(SHOW) > terminal.shown.rindex(HIDE)
    assert terminal.shown.rindex(LEAVE) > terminal.shown.rindex(ENTER)
    assert b"Resume it with: finetune resume" in terminal.shown


@pytest.mark.slow
def test_control_z_stops_both(work: Work, tmp_path: Path) -> None:
    terminal = started(work)
    supervisor = psutil.Process(terminal.pid)
    (child,) = supervisor.children()
    terminal.type(b"\x1a")
    for one in (supervisor, child):
        while one.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    os.kill(terminal.pid, signal.SIGCONT)
    while child.status() == psutil.STATUS_STOPPED:
        time.sleep(0.01)
    terminal.type(b"\x03")
    assert terminal.ended() == 130
