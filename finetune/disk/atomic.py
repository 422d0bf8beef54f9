"""Files and folders that are whole or absent, whatever interrupts the writing.

Everything is written beside its place under a temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import DiskError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>new|old)")
_REMEDIES = {
    errno.ENOSPC: "Make room on that disk, or write to another one.",
    errno.EDQUOT: "Your quota is used up: delete something of yours there, or write elsewhere.",
    errno.EFBIG: "The file system or `ulimit -f` allows no file of this size: write elsewhere, or raise the limit.",
    errno.EACCES: "Give yourself permission to write there, or write elsewhere.",
    errno.EPERM: "Give yourself permission to write there, or write elsewhere.",
    errno.EROFS: "That disk is mounted read-only: write elsewhere.",
    errno.EIO: "The disk reports a fault: check it, and write elsewhere.",
    errno.ENOTDIR: "Part of this path is a file, not a folder: choose another one.",
    errno.EEXIST: "There is a file where a folder is needed: choose another one.",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the disk's making into a DiskError with the path, the free bytes and a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else path
        place = path if named.is_relative_to(path.parent) else named  # not the temporary name
        free = _free_bytes(path)
        room = "" if free is None else f" ({free:,} bytes free)"
        raise DiskError(f"{place}: {os.strerror(error.errno)}{room}. {_REMEDIES[error.errno]}") from error


def make_folder(path: Path) -> None:
    """Makes `path` and its parents where they are missing, and they stay: a name is safe once its folder is flushed.

    Raises DiskError.
    """
    with disk_errors(path):
        missing = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for place in missing:
            sync_directory(place.parent)


def write_file(path: Path, data: bytes | str) -> None:
    """Replaces `path`, or leaves it as it was; text is written as UTF-8. Raises DiskError."""
    with disk_errors(path):
        make_folder(path.parent)
        temporary = _beside(path, "new")
        try:
            write_pieces(temporary, [data.encode() if isinstance(data, str) else data])
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; when the body succeeds it becomes `path`, else it is removed.

    An existing `path` is moved aside before and deleted after, so that one of the two is always there
    (`recover` puts the old one back after a kill between the two renames). One writer at a time.
    Raises DiskError.
    """
    with disk_errors(path):
        make_folder(path.parent)
        recover(path.parent, path.name)
        temporary = _beside(path, "new")
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _commit(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def recover(folder: Path, name: str | None = None) -> None:
    """Clears what a killed writer of `folder/name` (None: of anything in `folder`) left behind. Raises DiskError."""
    with disk_errors(folder):
        for entry in sorted(folder.iterdir()):
            found = _LEFTOVER.fullmatch(entry.name)
            if found is None or name not in (None, found["name"]):
                continue
            target = folder / found["name"]
            if found["kind"] == "old" and not target.exists():
                entry.replace(target)
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _commit(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.replace(path)
        sync_directory(path.parent)
        return
    old = _beside(path, "old")
    path.replace(old)
    try:
        temporary.replace(path)
    except BaseException:
        if not path.exists():
            old.replace(path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(old)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A new file of these pieces, one at a time, flushed; half of it may stay behind where that fails."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            # Windows flushes only handles that may write.
            _sync(Path(place, name), os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        sync_directory(Path(place))


def sync_directory(folder: Path) -> None:
    """Flushes the names in `folder` to the disk."""
    if os.name != "nt":  # which cannot open directories
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(path: Path) -> int | None:
    existing = next((place for place in (path, *path.absolute().parents) if place.exists()), None)
    with suppress(OSError):
        return None if existing is None else shutil.disk_usage(existing).free
    return None
