"""Training runs in the child of a small process, so that a crash in native code does not end without a message.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from finetune.disk.manifest import newest_good
from finetune.disk.weights import cut_short
from finetune.errors import ExitCode, stopped_by
from finetune.streams import unguarded
from finetune.text import command_line, one_line

STOPS = tuple(  # signals that ask a run to stop after its step
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# After these a run can be half done. After INTERRUPTED and TERMINATED the child has said so itself.
_EXPLAINED = {ExitCode.BUG, ExitCode.DIVERGED, ExitCode.MEMORY, ExitCode.DISK}
_SOCKET = "FINETUNE_SUPERVISOR"  # in the child's environment: its end of the socket pair
_PATIENCE = 5  # seconds from the second SIGINT to SIGKILL, for a child that hangs in native code
_SHORT = 0.8  # a killed child that held this share of the machine's memory had most likely run out of it
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
    sys.exit(code)


def announce_run(path: Path) -> None:
    """In the child: names the run's folder to the supervisor, for its message after a crash."""
    _announce(b"run", path)


def announce_model(path: Path) -> None:
    """In the child: names the model's folder, whose files are mapped into memory."""
    _announce(b"model", path)


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
    killed_before = _oom_kills()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, _SOCKET: str(theirs.fileno())}
        child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        with _Signals(child) as asked, _awake(child.pid):
            child.wait()
            said = _announced(ours)
            path = Path(said["run"]) if "run" in said else None
            code, reason = _explain_end(child.returncode, asked.number, _oom_kills() > killed_before, said)
            if child.returncode < 0 and sys.stderr.isatty():
                print("\x1b[?25h", file=unguarded(sys.stderr))  # the live screen had hidden the cursor
            if reason or code in _EXPLAINED:
                first = f"finetune: {reason}" if reason else f"exit code {code}: {ExitCode(code).meaning}."
                print("\n".join(map(one_line, [first, *_what_is_left(path, code)])), file=sys.stderr)
    return code


def listened_to() -> list[int]:
    """The signals that stop a run here: SIGHUP not under nohup, which has it ignored."""
    return [n for n in STOPS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]


class _Signals:
    """Hands signals on to the child; the supervisor outlives the child."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.number = 0  # of the first signal; 0: none yet

    def __enter__(self) -> _Signals:
        handlers = {
            **dict.fromkeys(listened_to(), self._pass_on), signal.SIGTSTP: self._pause,
            signal.SIGALRM: lambda number, frame: self._child.kill(),
        }  # fmt: skip
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *error: object) -> None:
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        os.kill(os.getpid(), signal.SIGSTOP)
        self._child.send_signal(signal.SIGCONT)


@contextmanager
def _awake(child: int) -> Iterator[None]:
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


def _end_when_alone(end: socket.socket) -> None:
    with suppress(OSError):
        end.recv(1)  # the supervisor never sends anything: this returns when it is gone
    os._exit(1)


def _announced(ours: socket.socket) -> dict[str, str]:
    """The last of each kind that the child named: "run", "model" and "reading"."""
    ours.setblocking(False)  # a process that the child left behind may hold its end open
    said = {}
    with suppress(OSError):
        for message in ours.recv(1 << 16).split(b"\0")[:-1]:
            kind, what = message.split(b" ", 1)
            said[kind.decode()] = os.fsdecode(what)
    return said


def _explain_end(code: int, asked: int, oom_killer: bool, said: Mapping[str, str]) -> tuple[int, str | None]:
    """Our exit code for the child's; and a sentence when a signal ended the child, so that it could say nothing.

    asked: number of the signal that the user sent, or 0. oom_killer: whether Linux killed a process for memory.
    said: what the child had announced, the folder whose files it had mapped and what it was reading among it.
    """
    if code >= 0:
        return code, None
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if asked and number in (asked, *STOPS, signal.SIGKILL):
        return stopped_by(asked), f"ended at once by {name}, as you asked."
    if number in STOPS:
        return stopped_by(number), f"the training process was ended by {name}."
    if number == signal.SIGBUS and "model" in said and (short := cut_short(Path(said["model"]))):
        files = ", ".join(map(str, short))
        return ExitCode.INCOMPATIBLE, (
            f"a mapped file was cut short while in use: {files} (SIGBUS); exit code 8. Put the whole file back, or "
            "download the model again."
        )
    if number == signal.SIGXFSZ:
        remedy = "Raise the limit, or write elsewhere."
        return ExitCode.DISK, f"a file grew beyond what `ulimit -f` allows (SIGXFSZ); exit code 6. {remedy}"
    if number != signal.SIGKILL:
        description = f"{name}, {signal.strsignal(number)}"
        if file := said.get("reading"):
            crashed = f"the training process crashed in native code ({description}) while it read {file}; exit code 8."
            return ExitCode.INCOMPATIBLE, f"{crashed} Download the file again, or use another."
        return ExitCode.BUG, f"the training process crashed in native code ({description}); exit code 1."
    if reason := "by the system's out-of-memory killer" if oom_killer else _memory_short():
        remedy = "Close other programs, set quantize: 4bit, or lower train.micro_tokens or train.max_length."
        message = f"the training process was killed because memory ran out ({reason}); exit code 5. {remedy}"
        return ExitCode.MEMORY, message
    return ExitCode.BUG, "another process killed the training process (SIGKILL); exit code 1."


def _what_is_left(path: Path | None, code: int) -> list[str]:
    """A line on what is left of the run, and how to resume it; none when there is no run yet."""
    if path is None or not (path / "recipe.yaml").exists():
        return []
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    if (path / "report.json").exists():
        return [f"The run is finished; its report is {path / 'report.txt'}"]
    newest = newest_good(path / "checkpoints")
    checkpoint = f"its last intact checkpoint is of step {newest[0]}" if newest else "it has no checkpoint yet"
    if code == ExitCode.DIVERGED:  # the same steps would diverge again
        return [f"The run {path} stays as it was: {checkpoint}."]
    return [f"The run is not lost: {checkpoint}. Resume it with: {command_line('finetune', 'resume', str(path))}"]


def _oom_kills() -> int:
    """Processes that Linux has killed for memory so far, on this machine or in this container; 0 elsewhere."""
    kills = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with suppress(OSError, ValueError):
            lines = (line.split() for line in Path(file).read_text().splitlines())
            kills += sum(int(words[1]) for words in lines if words[0] == "oom_kill")
    return kills


def _memory_short() -> str | None:
    """Why memory is most likely what the killed child had run out of; None when nothing points to it."""
    import resource  # not on Windows, where `announce_run` is imported too

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if used > _SHORT * whole:
        return f"it held {used / 1e9:.1f} of {whole / 1e9:.1f} GB"
    if sys.platform == "darwin":
        pressure = ["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]  # 1 normal, 2 warning, 4 critical
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            if int(subprocess.run(pressure, capture_output=True, timeout=5, check=True).stdout) > 1:
                return "macOS reports memory pressure"
    return None
