"""`--devices`: starts one process per device with the backend's launcher, passes signals on, and reports the end.

It loads nothing heavy. The first process of the run has the screen, and alone is asked to stop: it ends the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from backends import process_group, registry
from finetune import team_folder
from finetune.errors import EnvironmentProblem, ExitCode, RecipeError
from finetune.signals import handled, listened_to
from finetune.terminal import awake, silent_keys

MOST = 1024  # processes
_GRACE = 30.0  # seconds that the others have once one has failed
_POLL = 0.1  # seconds
_FULL = bytes(2**17)  # more than a pipe holds
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def processes(devices: str, backend: str) -> int:
    """How many `--devices` asks for. Raises RecipeError."""
    if devices == "all":
        return max(process_group.launcher(backend).cards(), 1)
    if not devices.isdecimal() or not 0 < int(devices) <= MOST:
        raise RecipeError(f"--devices {devices}: write a number of processes from 1 to {MOST:,}, or all")
    return int(devices)


def backend_of(requested: str) -> str:
    """The recipe's, or the first that is installed. Which of them works the processes find out."""
    if requested != "auto":
        return requested
    names = [name for name in registry.automatic() if registry.installed(name)]
    return names[0] if names else registry.choose()


def launch(devices: str | None, requested: str, alone: bool) -> None:
    """Returns where one process is enough; else runs this command in several, and exits with the code of its cause.

    requested: the recipe's backend. alone: whether no supervisor is wanted. Raises RecipeError, EnvironmentProblem,
    BackendError.
    """
    if devices is None or process_group.find_place() is not None:  # a launcher has started this one already
        return
    backend = backend_of(requested)
    count = processes(devices, backend)
    if count == 1:
        return
    if alone:
        raise RecipeError("--devices and --no-supervisor exclude each other; leave one away")
    if os.name != "posix":
        raise EnvironmentProblem("--devices needs Linux or macOS; on Windows it works within WSL2")
    launcher = process_group.launcher(backend)
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        team_folder.begin(folder)
        command = launcher.command(count, [*without_devices(sys.argv[1:]), "--backend", backend])
        variables = {**launcher.variables(), **_threads(count), **os.environ}
        code = run(command, variables | {team_folder.VARIABLE: name, team_folder.RANK_IN: launcher.RANK}, folder)
    sys.exit(code)


def without_devices(arguments: Sequence[str]) -> list[str]:
    """The same command without `--devices N`, and without the backend, which is named anew."""
    left, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--devices", "--backend"):
            skip = True
        elif not argument.startswith(("--devices=", "--backend=")):
            left.append(argument)
    return left


def _threads(count: int) -> Mapping[str, str]:
    """The processes share the processors."""
    return dict.fromkeys(_THREADS, str(max(processors() // count, 1)))


def processors() -> int:
    """Those that this process may run on: more threads would wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> int:
    """The launcher, to its end; afterwards no process of the run is left. The exit code of what ended the run."""
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    _fill(child)
    with _Signals(folder).passed_on() as asked, awake(child.pid), silent_keys():
        failed_at: float | None = None
        while child.poll() is None:
            time.sleep(_POLL)
            asked.deliver()
            if failed_at is None and any(end.code for end in team_folder.ends(folder)):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                _kill_all(folder)
        _kill_all(folder)
    if child.stdin is not None:
        child.stdin.close()
    return code_of(team_folder.ends(folder), child.returncode, asked.first)


def code_of(ends: Sequence[team_folder.End], launcher: int, asked: int) -> int:
    """Of the first process that failed of itself; else of one that lost another; else what the launcher says.

    asked: the signal that asked the run to stop, or 0.
    """
    failed = [end for end in ends if end.code]
    causes = [end for end in failed if not end.lost] or failed
    if causes:
        return causes[0].code
    if launcher and asked:
        return ExitCode.INTERRUPTED if asked == signal.SIGINT else ExitCode.TERMINATED
    return ExitCode.BUG if launcher or not ends else ExitCode.DONE  # mlx.launch always says 0


def _fill(child: subprocess.Popen[bytes]) -> None:
    """mlx.launch asks without pause whether its processes take input, and only full pipes let it sleep."""
    with suppress(OSError):
        assert child.stdin is not None
        os.set_blocking(child.stdin.fileno(), False)
        os.write(child.stdin.fileno(), _FULL)


def _kill_all(folder: Path) -> None:
    """Whatever is left of the run."""
    gone = {end.rank for end in team_folder.ends(folder)}
    for member in (one for one in team_folder.members(folder) if one.rank not in gone):
        for process in (member.child, member.supervisor):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


class _Signals:
    """Hands signals on to the first process's supervisor, as soon as there is one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self.first = folder, list[int](), 0

    @contextmanager
    def passed_on(self) -> Iterator[_Signals]:
        with handled({**dict.fromkeys(listened_to(), self._receive), signal.SIGTSTP: self._pause}):
            yield self

    def deliver(self) -> None:
        members = team_folder.members(self._folder)
        if members and members[0].rank == 0:
            while self._waiting:
                self._send(self._waiting.pop(0), members[0].supervisor)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self._waiting.append(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops all; `fg` and `bg` continue all."""
        supervisors = [member.supervisor for member in team_folder.members(self._folder)]
        for process in supervisors:
            self._send(number, process)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in supervisors:
            self._send(signal.SIGCONT, process)

    def _send(self, number: int, process: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)
