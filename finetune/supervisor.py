"""Training runs in a child of a small process, so that a crash of native code cannot end without a word.

An aborting GPU kernel or the kernel's out-of-memory killer leaves the child no time for a message: the supervisor
says how it ended, which checkpoint is good and how to go on. It loads nothing heavy.

The child has a session of its own and the terminal: the supervisor alone gets the terminal's signals and hands each
on once. The two hold the ends of a socket pair, over which the child tells the run's folder; and a child whose
supervisor is gone ends at once, so that no two processes ever write to one run.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from finetune.disk.manifest import newest_good

EXIT_CODES = {
    0: "done", 1: "a crash, or a bug of ours", 2: "the recipe", 3: "the data", 4: "training diverged",
    5: "out of memory", 6: "the disk", 7: "the backend", 8: "files that do not belong together",
    130: "interrupted", 143: "terminated",
}  # fmt: skip
_TELLS = {1, 4, 5, 6}  # exit codes after which a run can stand half done; 130 and 143 say it themselves
_SOCKET = "FINETUNE_SUPERVISOR"  # in the child's environment: its end of the socket pair
_PATIENCE = 5  # seconds from the second SIGINT to SIGKILL, for a child that hangs in native code
_SHORT = 0.8  # the share of the machine's memory from which on a killed child had most likely run out of it
_told: socket.socket | None = None  # the child's end


def supervise() -> None:
    """Returns in the child; the process that is called first becomes its supervisor and exits with its code."""
    global _told
    if handle := os.environ.pop(_SOCKET, None):
        _told = socket.socket(fileno=int(handle))
        _told.set_inheritable(False)
        threading.Thread(target=_end_when_alone, args=(_told,), daemon=True).start()
        return
    code = run([sys.executable, *sys.orig_argv[1:]])
    for number in (signal.SIGINT, signal.SIGTERM):  # one too many changes nothing now
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def tell_run(path: Path) -> None:
    """The child's word of where its run is, for the message should it crash."""
    if _told is not None:
        with suppress(OSError):
            _told.sendall(os.fsencode(path.absolute()) + b"\0")


def run(command: Sequence[str]) -> int:
    """The exit code of `command`, run to its end as a child; what must be said about it goes to standard error."""
    killed_before = _oom_kills()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, _SOCKET: str(theirs.fileno())}
        child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        with _Signals(child) as asked, _awake(child.pid):
            child.wait()
            path = _run_told(ours)
            code, reason = _ending(child.returncode, asked.number, _oom_kills() > killed_before)
            if child.returncode < 0 and sys.stderr.isatty():
                print("\x1b[?25h", file=sys.stderr)  # the live screen had hidden the cursor
            if reason or code in _TELLS:
                lines = [f"finetune: {reason}"] if reason else [f"exit code {code}: {EXIT_CODES[code]}."]
                print("\n".join([*lines, *_where(path, code)]), file=sys.stderr)
    return code


class _Signals:
    """Hands signals on to the child; the supervisor outlives it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child, self.number = child, 0

    def __enter__(self) -> _Signals:
        handlers = {
            signal.SIGINT: self._pass_on, signal.SIGTERM: self._pass_on, signal.SIGTSTP: self._pause,
            signal.SIGALRM: lambda number, frame: self._child.kill(),
        }  # fmt: skip
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *error: object) -> None:
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.alarm(_PATIENCE)
        self.number = self.number or number
        self._child.send_signal(number)  # nothing, where the child has ended

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops both; `fg` and `bg` let both go on."""
        self._child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._child.send_signal(signal.SIGCONT)


@contextmanager
def _awake(child: int) -> Iterator[None]:
    """A Mac does not fall asleep while the child lives; its display may."""
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
        end.recv(1)  # nothing is ever sent: it returns when the supervisor is gone
    os._exit(1)


def _run_told(ours: socket.socket) -> Path | None:
    ours.setblocking(False)  # a process that the child left behind may hold its end open
    with suppress(OSError):
        if told := ours.recv(1 << 16):
            return Path(os.fsdecode(told.rstrip(b"\0").split(b"\0")[-1]))
    return None


def _ending(code: int, asked: int, oom_killer: bool) -> tuple[int, str | None]:
    """Our exit code, and one sentence where the child could not say its own."""
    if code >= 0:
        return code, None
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if asked and number in (asked, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        return 128 + asked, f"ended at once by {name}, as you asked."
    if number in (signal.SIGINT, signal.SIGTERM):
        return 128 + number, f"the training process was ended by {name}."
    if number != signal.SIGKILL:
        return 1, f"the training process crashed in native code ({name}, {signal.strsignal(number)}); exit code 1."
    if reason := "the kernel's out-of-memory killer was at work" if oom_killer else _memory_short():
        remedy = "Close other programs, set quantize: 4bit, or lower train.micro_tokens or train.max_length."
        return 5, f"the training process was killed for memory ({reason}); exit code 5. {remedy}"
    return 1, "the training process was killed from outside (SIGKILL); exit code 1."


def _where(path: Path | None, code: int) -> list[str]:
    """What is left of the run and how to go on."""
    if path is None or not (path / "recipe.yaml").exists():
        return []
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    if (path / "report.json").exists():
        return [f"The run is finished: its report is {path / 'report.txt'}"]
    found = newest_good(path / "checkpoints")
    good = f"its newest good checkpoint is of step {found[0]}" if found else "it has no checkpoint yet"
    if code == 4:  # the same steps would end the same
        return [f"The run {path} stands as it was: {good}."]
    return [f"The run is not lost: {good}; go on with: finetune resume {shlex.quote(str(path))}"]


def _oom_kills() -> int:
    """Processes that Linux has killed for memory so far, on this machine or in this container; 0 elsewhere."""
    found = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with suppress(OSError, ValueError):
            lines = (line.split() for line in Path(file).read_text().splitlines())
            found += sum(int(words[1]) for words in lines if words[0] == "oom_kill")
    return found


def _memory_short() -> str | None:
    """Why memory was most likely what the killed child had run out of."""
    import resource  # not on Windows, where `tell_run` is imported too

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if used > _SHORT * whole:
        return f"it held {used / 1e9:.1f} of {whole / 1e9:.1f} GB"
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]  # 1 normal, 2 warning, 4 critical
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            if int(subprocess.run(asked, capture_output=True, timeout=5, check=True).stdout) > 1:
                return "macOS reports memory pressure"
    return None
