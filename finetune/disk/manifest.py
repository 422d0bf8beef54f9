"""Checks a checkpoint folder against its manifest of sizes and SHA-256. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
Entry = dict[str, Any]  # of a file: "bytes", how many, and their "sha256"
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 2**16  # bytes read at a time
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file browsers leave in any folder they show


class Broken(Exception):
    """Why a checkpoint does not verify."""


def newest_good(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that verifies. Changes nothing."""
    if not folder.is_dir():
        return None
    for step, path in newest_first(folder):
        try:
            verify(path)
            return step, path
        except (Broken, OSError):
            continue
    return None


def newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of every checkpoint there, broken ones too."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


class Tally:
    """Size and SHA-256 of the bytes that go by."""

    def __init__(self) -> None:
        self._bytes, self._sha256 = 0, hashlib.sha256()

    def passing(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            self._bytes += len(piece)
            self._sha256.update(piece)
            yield piece

    def entry(self) -> Entry:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}


def manifest_of(entries: Mapping[str, Entry]) -> bytes:
    """The one possible manifest of these files, so that any change to it or to them can be seen."""
    return json_bytes({"format": FORMAT, "files": {name: entries[name] for name in sorted(entries)}})


def verify(path: Path) -> None:
    """Reads every file, a block at a time. Raises Broken; PermissionError."""
    with _reading():
        entries = {file.name: _entry(_blocks(file)) for file in _files(path)}
        manifest = (path / MANIFEST).read_bytes() if MANIFEST in entries else None
    _compare(manifest, entries)


def read_verified(path: Path) -> dict[str, bytes]:
    """The verified bytes of every file but the manifest. Raises Broken; PermissionError."""
    with _reading():
        files = {file.name: file.read_bytes() for file in _files(path)}
    _compare(files.get(MANIFEST), {name: _entry([data]) for name, data in files.items()})
    return {name: data for name, data in files.items() if name != MANIFEST}


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        raise Broken(str(error)) from error


def _files(path: Path) -> list[Path]:
    found = [entry for entry in path.iterdir() if entry.name not in _LITTER]
    if strange := [one.name for one in found if one.is_symlink() or not one.is_file()]:
        raise Broken(f"{strange[0]} is not a plain file")
    return found


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            yield block


def _entry(pieces: Iterable[bytes]) -> Entry:
    tally = Tally()
    for _ in tally.passing(pieces):
        pass
    return tally.entry()


def _compare(manifest: bytes | None, entries: dict[str, Entry]) -> None:
    """Raises Broken where the manifest is not that of the other files."""
    if manifest is None:
        raise Broken(f"{MANIFEST} is missing")
    others = {name: entry for name, entry in entries.items() if name != MANIFEST}
    if manifest != manifest_of(others):
        raise Broken(_difference(manifest, others))


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _difference(manifest: bytes, entries: Mapping[str, Entry]) -> str:
    try:
        listed = json.loads(manifest)
        if listed["format"] != FORMAT:
            return f"its format is {listed['format']!r}, this version reads {FORMAT}"
        for name, entry in listed["files"].items():
            if name not in entries:
                return f"{name} is missing"
            if entries[name]["bytes"] != entry["bytes"]:
                return f"{name} has {entries[name]['bytes']} bytes, and {entry['bytes']} in {MANIFEST}"
            if entries[name]["sha256"] != entry["sha256"]:
                return f"{name} does not have the SHA-256 in {MANIFEST}"
        extra = sorted(set(entries) - set(listed["files"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return f"{extra[0]} does not belong there" if extra else f"{MANIFEST} is not what was written"
