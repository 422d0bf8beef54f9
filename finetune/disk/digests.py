"""SHA-256 of files, cached so that an unchanged file is read once."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.events import Progress

_PIECE = 2**24  # bytes read at a time
_REMEMBERED = 4000  # files
_SETTLED = 2_000_000_000  # ns; a file that changed so lately may change again without a newer time


def digests(files: Sequence[Path]) -> Generator[Progress, None, list[str]]:
    """BLAKE2b of every byte of each file, in hexadecimal. Raises OSError."""
    memory = _memory(cache_folder() / "digests.json")
    sizes = [file.stat().st_size for file in files]
    total, done, made = sum(sizes), 0, []
    for file, size in zip(files, sizes, strict=True):
        known = memory.get(file)
        if known is None:
            known = yield from _read(file, done, total)
            memory.put(file, known)
        made.append(known)
        done += size
    memory.save()
    return made


def _read(file: Path, done: int, total: int) -> Generator[Progress, None, str]:
    digest = hashlib.blake2b(digest_size=32)
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with file.open("rb") as opened:
        while count := opened.readinto(buffer):
            digest.update(view[:count])
            done += count
            yield Progress(0, "model: reading every byte, once", min(done, total), total)
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _memory(file: Path) -> _Memory:
    return _Memory(file)


class _Memory:
    """Digests by path, with what the file system said of the file: its size, times and number."""

    def __init__(self, file: Path) -> None:
        self._file, self._changed = file, False
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = found if isinstance(found, dict) else {}

    def get(self, file: Path) -> str | None:
        entry = self._known.get(str(file.resolve()))
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == _said(file) and isinstance(entry[1], str):
            return entry[1]
        return None

    def put(self, file: Path, digest: str) -> None:
        said, name = _said(file), str(file.resolve())
        self._known.pop(name, None)
        if time.time_ns() - max(said[1:3]) > _SETTLED:
            self._known[name] = [said, digest]
            self._changed = True

    def save(self) -> None:
        """Nothing depends on it: where it cannot be written, the files are read again the next time."""
        if not self._changed:
            return
        newest = dict(list(self._known.items())[-_REMEMBERED:])
        temporary = self._file.with_name(f".{self._file.name}.{secrets.token_hex(4)}.new")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(newest, indent=0), encoding="utf-8")
            temporary.replace(self._file)
            self._changed = False
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _said(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def cache_folder() -> Path:
    """FINETUNE_CACHE, or where this user's programs keep what they can make again."""
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "finetune"
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() raises where there is none)
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "finetune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home) / "finetune" / "cache"
    return home / ".cache" / "finetune"
