"""Explains how a process ended in native code or was killed: exit code, a sentence, and what is left.

Nothing heavy: the supervisor of a run asks it, and so does a command without one whose mapped model is cut short.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.disk.manifest import newest_good
from finetune.disk.weight_files import cut_short
from finetune.errors import ExitCode, stopped_by
from finetune.signals import STOPS
from finetune.text import command_line, one_line

MAPPED: list[Path] = []  # the folders of the models that this process has mapped
_SHORT = 0.8  # a killed child that held this share of the machine's memory had most likely run out of it
_on_bus_error: Any = None  # the handler, which must live as long as the process


def explain_cut_files() -> None:
    """For commands without a supervisor: one whose mapped model is cut short says so and ends, as a run does.

    The system raises SIGBUS in the very thread that reads, which goes no further until the handler returns. Python's
    own handlers run only between two lines of Python, so the system calls this one, and it never returns. It costs no
    time at the start, and nothing of the terminal, of Ctrl-C or of standard input changes, as they would for a child.
    """
    import ctypes

    global _on_bus_error

    def end(number: int) -> None:
        if reason := _cut_short(MAPPED):
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live screen had hidden the cursor
            os.write(2, f"{shown}\nfinetune: {one_line(reason)}\n".encode(errors="replace"))
            os._exit(ExitCode.INCOMPATIBLE)
        libc.signal(number, None)  # another fault: it comes again, and ends the process as it always did

    _on_bus_error = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGBUS, _on_bus_error)


def explain_end(
    code: int, asked: int, oom_killer: bool, said: Mapping[str, str], mapped: Sequence[Path]
) -> tuple[int, str | None]:
    """Our exit code for the child's; and a sentence when a signal ended the child, so that it could say nothing.

    asked: number of the signal that the user sent, or 0. oom_killer: whether Linux killed a process for memory.
    said: what the child had announced, what it was reading among it. mapped: folders whose files it had mapped.
    """
    if code >= 0:
        return code, None
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if asked and number in (asked, *STOPS, signal.SIGKILL):
        return stopped_by(asked), f"ended at once by {name}, as you asked."
    if number in STOPS:
        return stopped_by(number), f"the training process was ended by {name}."
    if number == signal.SIGBUS and (reason := _cut_short(mapped)):
        return ExitCode.INCOMPATIBLE, reason
    if number == signal.SIGXFSZ:
        remedy = "Raise the limit, or write elsewhere."
        return ExitCode.DISK, f"a file grew beyond what `ulimit -f` allows (SIGXFSZ); exit code 6. {remedy}"
    if number != signal.SIGKILL:
        description = f"{name}, {signal.strsignal(number)}"
        if file := said.get("reading"):
            crashed = f"the training process crashed in native code ({description}) while it read {file}; exit code 8."
            return ExitCode.INCOMPATIBLE, f"{crashed} Download the file again, or use another."
        return ExitCode.BUG, f"the training process crashed in native code ({description}); exit code 1."
    if how := "by the system's out-of-memory killer" if oom_killer else _memory_short():
        remedy = "Close other programs, set quantize: 4bit, or lower train.micro_tokens or train.max_length."
        message = f"the training process was killed because memory ran out ({how}); exit code 5. {remedy}"
        return ExitCode.MEMORY, message
    return ExitCode.BUG, "another process killed the training process (SIGKILL); exit code 1."


def _cut_short(mapped: Sequence[Path]) -> str | None:
    """What to say of the folders' files that are shorter than they say; None: all are whole."""
    files = ", ".join(str(file) for folder in mapped for file in cut_short(folder))
    if not files:
        return None
    cut = f"a mapped file was cut short while in use: {files} (SIGBUS); exit code 8."
    return f"{cut} Put the whole file back, or download the model again."


def what_is_left(path: Path | None, code: int) -> list[str]:
    """A line on what is left of the run or the search, and how to resume it; none when there is none yet."""
    if path is None or not any((path / name).exists() for name in ("recipe.yaml", "search.yaml")):
        return []
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    if (path / "search.yaml").exists():
        again = f"The search is not lost. Go on with: {command_line('finetune', 'resume', str(path))}"
        return [] if code == ExitCode.DIVERGED else [again]
    if (path / "report.json").exists():
        return [f"The run is finished; its report is {path / 'report.txt'}"]
    newest = newest_good(path / "checkpoints")
    checkpoint = f"its last intact checkpoint is of step {newest[0]}" if newest else "it has no checkpoint yet"
    if code == ExitCode.DIVERGED:  # the same steps would diverge again
        return [f"The run {path} stays as it was: {checkpoint}."]
    return [f"The run is not lost: {checkpoint}. Resume it with: {command_line('finetune', 'resume', str(path))}"]


def oom_kills() -> int:
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
