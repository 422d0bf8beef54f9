"""Runs training in a child process, so that a crash in native code still ends with a message.

A GPU kernel that aborts, or the system's out-of-memory killer, leaves the child no time to say anything. Then the
supervisor says how the child ended, which checkpoint is intact and how to resume. It loads nothing heavy.

The child has its own session and keeps the terminal. Only the supervisor gets the terminal's signals, and it hands
each on once. The two hold the ends of a socket pair. Over it the child names the folder of its run; and a child whose
supervisor is gone ends at once, so that two processes never write to one run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from finetune import crashes, team_folder
from finetune.errors import ExitCode
from finetune.signals import STOPS, Handler, handled, listened_to
from finetune.terminal import awake, enter_page, in_background, key_settings, leave_page, restore_keys
from finetune.text import one_line

# After these a run can be half done. After INTERRUPTED and TERMINATED the child has said so itself.
_EXPLAINED = {ExitCode.BUG, ExitCode.DIVERGED, ExitCode.MEMORY, ExitCode.DISK}
_SOCKET = "FINETUNE_SUPERVISOR"  # in the child's environment: its end of the socket pair
_PATIENCE = 5  # seconds from the second SIGINT to SIGKILL, for a child that hangs in native code
_channel: socket.socket | None = None  # the child's end of the socket pair


def supervise() -> None:
    """Returns in the child. The process that called it first becomes the supervisor and exits with the child's code."""
    global _channel
    if descriptor := os.environ.pop(_SOCKET, None):
        _channel = socket.socket(fileno=int(descriptor))
        _channel.set_inheritable(False)
        threading.Thread(target=_end_when_alone, args=(_channel,), daemon=True).start()
        return
    code = run([sys.executable, *sys.orig_argv[1:]])
    for number in STOPS:  # the child has ended: one more signal must not change the code
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0 if team_folder.folder() else code)  # there it is written down, and the launcher need not hear of it


def announce_run(path: Path) -> None:
    """In the child: names the run's folder to the supervisor, for its message after a crash."""
    _announce(b"run", path)


def announce_model(path: Path) -> None:
    """Names a model's folder, whose files are mapped into memory from now on."""
    crashes.MAPPED.append(path.absolute())
    _announce(b"model", path)


def announce_page(shown: bool) -> None:
    """In the child: whether it has a page of its own on the terminal, which a crash would leave there."""
    _announce(b"page", "shown" if shown else "")


def announce_lost() -> None:
    """In the child: it ends because another process of its run is gone."""
    _announce(b"lost", "yes")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """In the child: libraries of native code read `what` now, a file that came from elsewhere."""
    _announce(b"reading", what)
    try:
        yield
    finally:
        _announce(b"reading", "")


def _announce(kind: bytes, what: Path | str) -> None:
    if _channel is not None:
        with suppress(OSError):
            _channel.sendall(kind + b" " + os.fsencode(what if isinstance(what, str) else what.absolute()) + b"\0")


def process_id() -> int:
    """Of the process that the user started: the supervisor, or this one where there is none."""
    return os.getppid() if _channel is not None else os.getpid()


def run(command: Sequence[str]) -> int:
    """Runs `command` as a child to its end and returns its exit code; explains a crash on standard error."""
    killed_before, keys = crashes.oom_kills(), key_settings()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, _SOCKET: str(theirs.fileno())}
        if in_background():
            environment["TTY_INTERACTIVE"] = "0"  # the terminal is another's, such as the shell's
        child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        team_folder.started(child.pid)
        with _Signals(child, ours).passed_on() as asked, awake(child.pid):
            child.wait()
            said, mapped = _announced(ours)
            path = Path(said["run"]) if "run" in said else None
            code, reason = crashes.explain_end(
                child.returncode, asked.number, crashes.oom_kills() > killed_before, said, mapped
            )
            if child.returncode < 0 and sys.stderr.isatty():
                restore_keys(keys)
                leave_page(bool(said.get("page")))
            if reason or code in _EXPLAINED:
                first = [f"finetune: {_whose()}{reason}"] if reason else _meaning(code, "lost" in said)
                print("\n".join(map(one_line, [*first, *crashes.what_is_left(path, code)])), file=sys.stderr)
            team_folder.ended(code, "lost" in said)
    return code


def _whose() -> str:
    """Of several processes, which one."""
    rank = team_folder.own_rank()
    return "" if rank is None else f"process {rank}: "


def _meaning(code: int, lost: bool) -> list[str]:
    """A line; none where another process is the cause."""
    return [] if lost else [f"exit code {code}: {ExitCode(code).meaning}."]


class _Signals:
    """Hands signals on to the child; the supervisor outlives the child."""

    def __init__(self, child: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self._child, self._ours = child, ours
        self.number = 0  # of the first signal; 0: none yet

    @contextmanager
    def passed_on(self) -> Iterator[_Signals]:
        others: dict[int, Handler] = {signal.SIGTSTP: self._pause, signal.SIGALRM: lambda *_: self._child.kill()}
        with handled(dict.fromkeys(listened_to(), self._pass_on) | others):
            try:
                yield self
            finally:
                signal.alarm(0)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == getattr(signal, "SIGHUP", None):
            return  # a terminal that closes may say so more than once, and nobody is in a hurry
        if self.number:
            signal.alarm(_PATIENCE)
        self.number = self.number or number
        self._child.send_signal(number)  # does nothing when the child has ended

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops both; `fg` and `bg` continue both."""
        self._child.send_signal(signal.SIGSTOP)
        page = bool(_announced(self._ours, socket.MSG_PEEK)[0].get("page"))
        if page:
            leave_page()
        os.kill(os.getpid(), signal.SIGSTOP)
        if page and not in_background():
            enter_page()
        self._child.send_signal(signal.SIGCONT)


def _end_when_alone(end: socket.socket) -> None:
    with suppress(OSError):
        end.recv(1)  # the supervisor never sends anything: this returns when it is gone
    os._exit(1)


def _announced(ours: socket.socket, flags: int = 0) -> tuple[dict[str, str], list[Path]]:
    """The last of each kind that the child named, "run", "model", "page" and "reading"; and every model."""
    ours.setblocking(False)  # a process that the child left behind may hold its end open
    said, models = {}, []
    with suppress(OSError):
        for message in ours.recv(1 << 16, flags).split(b"\0")[:-1]:
            kind, what = message.split(b" ", 1)
            said[kind.decode()] = os.fsdecode(what)
            models += [Path(os.fsdecode(what))] if kind == b"model" else []
    return said, models
