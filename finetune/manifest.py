"""Whether a checkpoint folder is whole: its files against the sizes and SHA-256 in its manifest. Nothing heavy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file browsers leave in any folder they show


class Broken(Exception):
    """Why a checkpoint does not verify."""


def newest_good(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that verifies. Changes nothing."""
    if not folder.is_dir():
        return None
    for step, path in newest_first(folder):
        try:
            read_verified(path)
            return step, path
        except (Broken, OSError):
            continue
    return None


def newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of every checkpoint there, broken ones too."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    yield from sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def manifest_of(files: Mapping[str, bytes]) -> bytes:
    """The one possible manifest of these files, so that any change to it or to them can be seen."""
    entries = {
        name: {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()} for name in sorted(files)
    }
    return json_bytes({"format": FORMAT, "files": entries})


def read_verified(path: Path) -> dict[str, bytes]:
    """The verified bytes of every file but the manifest. Raises Broken; PermissionError."""
    try:
        entries = [entry for entry in path.iterdir() if entry.name not in _LITTER]
        if strange := [one.name for one in entries if one.is_symlink() or not one.is_file()]:
            raise Broken(f"{strange[0]} is not a plain file")
        files = {entry.name: entry.read_bytes() for entry in entries}
    except PermissionError:
        raise
    except OSError as error:
        raise Broken(str(error)) from error
    manifest = files.pop(MANIFEST, None)
    if manifest is None:
        raise Broken(f"{MANIFEST} is missing")
    if manifest != manifest_of(files):
        raise Broken(_difference(manifest, files))
    return files


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _difference(manifest: bytes, files: Mapping[str, bytes]) -> str:
    try:
        listed = json.loads(manifest)
        if listed["format"] != FORMAT:
            return f"its format is {listed['format']!r}, this version reads {FORMAT}"
        for name, entry in listed["files"].items():
            if name not in files:
                return f"{name} is missing"
            if len(files[name]) != entry["bytes"]:
                return f"{name} has {len(files[name])} bytes, and {entry['bytes']} in {MANIFEST}"
            if hashlib.sha256(files[name]).hexdigest() != entry["sha256"]:
                return f"{name} does not have the SHA-256 in {MANIFEST}"
        extra = sorted(set(files) - set(listed["files"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return f"{extra[0]} does not belong there" if extra else f"{MANIFEST} is not what was written"
