"""Files by which the processes of `--devices` report their start and their end to the parent.

Neither torchrun nor mlx.launch passes an exit code on. A temporary folder holds a small file for each process; its
supervisor writes it. Nothing of a step goes through here. Light: the supervisor of a run imports it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "FINETUNE_TEAM"  # in the environment of every process: the folder
RANK_IN = "FINETUNE_RANK_IN"  # the variable in which the launcher says a process's number; "RANK" where it is not set
_TOP, _MEMBER, _END = "top", "member", "end"


@dataclass(frozen=True)
class Member:
    """A supervisor and its child."""

    rank: int
    supervisor: int
    child: int


@dataclass(frozen=True)
class End:
    """How a process has ended."""

    rank: int
    code: int
    lost: bool  # because another one was gone
    seconds: float  # of the system's monotonic clock


def folder() -> Path | None:
    """None: this process was not started by `--devices`."""
    return Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def own_rank() -> int | None:
    """As the launcher says it; None: this process is alone, as far as it knows."""
    text = os.environ.get(os.environ.get(RANK_IN, "RANK"), "")
    return int(text) if text.isdecimal() else None


def begin(path: Path) -> None:
    (path / _TOP).write_text(str(os.getpid()))


def started(child: int) -> None:
    """In a supervisor."""
    if (path := folder()) is not None:
        _write(path, _MEMBER, Member(own_rank() or 0, os.getpid(), child))


def ended(code: int, lost: bool) -> bool:
    """In a supervisor: whether it was written down, and the launcher need not hear of it."""
    if (path := folder()) is None or not path.is_dir():
        return False
    _write(path, _END, End(own_rank() or 0, code, lost, time.monotonic()))
    return True


def members(path: Path) -> list[Member]:
    return sorted((Member(**values) for values in _read(path, _MEMBER)), key=lambda member: member.rank)


def ends(path: Path) -> list[End]:
    """The earliest first."""
    return sorted((End(**values) for values in _read(path, _END)), key=lambda end: end.seconds)


def failure() -> str | None:
    """In a child: what is known of a process that has failed, or that its command is gone."""
    if (path := folder()) is None:
        return None
    with suppress(OSError, ValueError):
        if not alive(int((path / _TOP).read_text())):
            return "the command that started this process is gone"
    own = own_rank()
    return next(
        (f"process {end.rank} has ended (exit code {end.code})" for end in ends(path) if end.rank != own and end.code),
        None,
    )


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(path: Path, kind: str, what: Member | End) -> None:
    """Whole or absent, for whoever reads meanwhile."""
    with suppress(OSError):
        unfinished = path / f".{kind}.{what.rank}"
        unfinished.write_text(json.dumps(asdict(what)))
        unfinished.replace(path / f"{kind}.{what.rank}")


def _read(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    for file in path.glob(f"{kind}.*"):
        with suppress(OSError, ValueError):
            yield json.loads(file.read_text())
