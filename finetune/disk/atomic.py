"""Files and folders that are whole or absent, whatever interrupts the writing.

Everything is written beside its place under a temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import DiskError, FinetuneError
from finetune.text import harmless

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
    errno.ENOENT: "Part of this path is gone, or no folder can be made there: choose another place.",
    errno.ENAMETOOLONG: "The name, or the path to it, is too long for this file system: choose a shorter one.",
    errno.ELOOP: "There is a link where none may be: remove it, or choose another place.",
    errno.ESTALE: "The folder is no longer on its server: look there, or write elsewhere.",
}
_OTHER = "Look at that place, or write elsewhere."
_NO_FLUSH = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # SMB, FUSE: such a folder has no flush
_TRIES, _PAUSE = (20 if os.name == "nt" else 1), 0.1  # seconds: how long a Windows virus scanner may hold a file
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # how tokenizers and safetensors end an error of the disk


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an error of the disk into a DiskError with the path, the free bytes and a remedy.

    The body does nothing but disk work: every OSError in it is of the disk, and so is every error of a library in Rust
    that ends with an errno.
    """
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else path
        if error.errno == errno.ENOENT and named != path and named.parent.exists():
            raise  # a file that the body looked for in vain: a mistake of ours
        shown = path if named.is_relative_to(path.parent) else named  # not the temporary name
        raise _disk_error(shown, path, error.errno or errno.EIO) from error
    except Exception as error:
        if isinstance(error, FinetuneError) or not (code := _OF_RUST.search(str(error))):
            raise
        raise _disk_error(path, path, int(code[1])) from error


def _disk_error(shown: Path, path: Path, code: int) -> DiskError:
    free = _free_bytes(path)
    room = "" if free is None else f" ({free:,} bytes free)"
    return DiskError(f"{harmless(str(shown))}: {os.strerror(code)}{room}. {_REMEDIES.get(code, _OTHER)}")


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
            rename(temporary, path)
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
            if found["kind"] == "old" and not os.path.lexists(target):
                rename(entry, target)
            else:
                remove(entry)


def _commit(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):  # a link that leads nowhere is there too
        rename(temporary, path)
        sync_directory(path.parent)
        return
    old = _beside(path, "old")
    rename(path, old)
    try:
        rename(temporary, path)
    except BaseException:
        if not os.path.lexists(path):
            rename(old, path)
        raise
    sync_directory(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a file, a folder with all in it, or a link: never what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        _patiently(lambda: shutil.rmtree(path))
    else:
        _patiently(path.unlink)


def rename(path: Path, target: Path) -> None:
    """`Path.replace`."""
    _patiently(lambda: path.replace(target))


def _patiently(work: Callable[[], object]) -> None:
    """On Windows a virus scanner or an indexer holds a new file for a moment: refused work is tried again for 2 s."""
    for left in reversed(range(_TRIES)):
        try:
            work()
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(_PAUSE)


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
    """Flushes the names in `folder` to the disk, where its file system does so."""
    if os.name == "nt":  # which cannot open directories
        return
    try:
        _sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        existing = next((place for place in (path, *path.absolute().parents) if os.path.exists(place)), None)  # noqa: PTH110
        return None if existing is None else shutil.disk_usage(existing).free
    return None
