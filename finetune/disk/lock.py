"""One process at a time writes to a run: a lock of the operating system on a file in the run's folder.

The lock is the system's, not the file's presence: it ends with its process, however that ends, and a file that a
killed process left behind locks nothing. The file says who holds the lock, which is why the library filelock does not
serve: it empties the file before it knows whether it gets the lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune.disk.atomic import disk_errors
from finetune.errors import DiskError, Incompatible
from finetune.text import shorten

NAME = ".lock"
PATIENCE = 2.0  # seconds that a killed process may take to end
_PAUSE = 0.05  # seconds between two tries
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_BEYOND = 2**20  # Windows locks bytes, and what is locked cannot be read: a byte behind the holder's name


@dataclass(frozen=True)
class Lock:
    """A run's folder that this process alone writes to."""

    folder: Path
    handle: int  # of the open file, which tells this folder from any other that takes its place
    note: str | None = None  # where the file system has no locks

    def check(self) -> None:
        """Raises DiskError where the folder is no longer where it was."""
        if not _same(self.handle, self.folder / NAME):
            raise DiskError(
                f"{self.folder}: the run's folder, or its {NAME}, was moved, deleted or replaced while this process "
                "wrote to it. If the folder is elsewhere now, resume the run there"
            )


@contextmanager
def locked(folder: Path, process: int) -> Iterator[Lock]:
    """Inside, no other process has this run. process: the one that the user started, for others to be named.

    Raises Incompatible, naming the holder, where another process has it; DiskError.
    """
    file, until = folder / NAME, time.monotonic() + PATIENCE
    while (lock := _attempt(file, process)) is None:
        if time.monotonic() >= until:
            raise Incompatible(f"{folder}: {_holder(file)} works on this run; wait until it ends, or stop it")
        time.sleep(_PAUSE)
    try:
        yield lock
    finally:
        with suppress(OSError):
            if os.name != "nt" and _same(lock.handle, file):  # Windows deletes no open file
                file.unlink()
        os.close(lock.handle)


def is_locked(folder: Path) -> bool:
    """Whether a process works on this run now; False where that cannot be known. Makes no file, and waits for none."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(folder / NAME, os.O_RDWR | flags)
    except OSError:
        return False
    try:
        _lock(handle)  # freed as the file is closed; who begins at this moment tries again
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(handle)
    return False


def _attempt(file: Path, process: int) -> Lock | None:
    """The lock; None where another process has it, or has just removed the file. Raises Incompatible, DiskError."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with disk_errors(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | flags, 0o666)
    lock = None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Incompatible(f"{file}: not a regular file; remove it")
        note = _lock(handle)
        if _same(handle, file):
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            holder = {"process": process, "training": os.getpid(), "host": socket.gethostname(), "since": since}
            with disk_errors(file):
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(holder).encode())
            lock = Lock(file.parent, handle, note)
    except OSError as error:
        if error.errno not in _HELD:
            raise
    finally:
        if lock is None:
            os.close(handle)
    return lock


def _lock(handle: int) -> str | None:
    """Locks the open file, or says why that cannot be done here. Raises OSError with an errno of `_HELD`."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, _BEYOND, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return (
            f"this file system has no locks ({os.strerror(error.errno)}): nothing but you prevents two processes from "
            "working on this run at once"
        )
    return None


def _same(handle: int, file: Path) -> bool:
    """Whether the file at this path is the open one."""
    try:
        return os.path.samestat(os.fstat(handle), file.lstat())
    except OSError:
        return False


def _holder(file: Path) -> str:
    """`process 12 (training in 13) on host, since 2026-01-31 09:00:00+01:00,`, as far as the file says it."""
    try:
        says = json.loads(file.read_bytes()[:1000])
        process, training, host, since = (shorten(str(says[k]), 80) for k in ("process", "training", "host", "since"))
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
    inner = "" if process == training else f" (training in {training})"
    return f"process {process}{inner} on {host}, since {since},"
