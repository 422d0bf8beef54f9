"""A disk that forgets: what was written under a folder is recorded, and given back as a failing power supply leaves it.

The promises are those of POSIX and no more. A file's bytes are safe once the file was flushed, a name in a folder
once the folder was. What was not flushed may be there or be missing, each by itself and so in any order, and bytes
may be cut off, or be zero in blocks of 512.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BLOCK = 512


@dataclass(eq=False)
class Node:
    """A file, or a folder, which has `names`."""

    names: dict[str, Node] | None = None


@dataclass
class Change:
    """An entry of the log: bytes appended to a file, names set (None: removed) in a folder, or (neither) a flush."""

    node: Node
    data: bytes = b""
    names: dict[str, Node | None] = field(default_factory=dict)


class Recorder:
    """The log of all that changed under `root`, which was empty."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node({})
        self.log: list[Change] = []
        self.promised: list[tuple[int, Any]] = []  # (length of the log, what was promised then)
        self._handles: dict[int, Path] = {}

    def promise(self, what: Any) -> None:
        self.promised.append((len(self.log), what))

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Of os.*, of Path.write_bytes, and of files that Path.open appends to."""
        notes: dict[str, Callable[..., None]] = {
            "mkdir": self._made, "replace": self._renamed, "rename": self._renamed, "unlink": self._removed,
            "remove": self._removed, "rmdir": self._removed, "open": self._opened, "close": self._closed,
            "write": self._wrote, "fsync": self._flushed,
        }  # fmt: skip
        with patch.context() as hooks:
            for name, note in notes.items():
                hooks.setattr(os, name, _hooked(getattr(os, name), note))
            hooks.setattr(Path, "write_bytes", _hooked(Path.write_bytes, self._written))
            hooks.setattr(Path, "open", _hooked(Path.open, self._appending))
            yield

    def _parts(self, path: Any, dir_fd: int | None = None) -> tuple[str, ...]:
        """Below `root`; () for what is elsewhere."""
        base = Path.cwd() if dir_fd is None else self._handles.get(dir_fd, Path("/"))
        whole = base / os.fsdecode(path)
        return whole.relative_to(self.root).parts if whole.is_relative_to(self.root) else ()

    def _node(self, parts: tuple[str, ...]) -> Node:
        node = self.top
        for part in parts:
            assert node.names is not None
            node = node.names[part]
        return node

    def _name(self, folder: tuple[str, ...], names: dict[str, Node | None]) -> None:
        node = self._node(folder)
        self.log.append(Change(node, names=names))
        _apply(node, names)

    def _made(self, _: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if parts := self._parts(path, dir_fd):
            self._name(parts[:-1], {parts[-1]: Node({})})

    def _renamed(self, _: Any, source: Any, target: Any) -> None:
        if (ours := self._parts(source)) and (theirs := self._parts(target)):
            assert ours[:-1] == theirs[:-1], "a rename stays in its folder"
            self._name(ours[:-1], {ours[-1]: None, theirs[-1]: self._node(ours)})

    def _removed(self, _: Any, path: Any, *, dir_fd: int | None = None) -> None:
        if parts := self._parts(path, dir_fd):
            self._name(parts[:-1], {parts[-1]: None})

    def _opened(self, handle: int, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if parts := self._parts(path, dir_fd):
            self._handles[handle] = self.root.joinpath(*parts)
            if flags & os.O_CREAT:
                self._create(parts)
        elif Path(os.fsdecode(path)) == self.root:
            self._handles[handle] = self.root

    def _closed(self, _: Any, handle: int) -> None:
        self._handles.pop(handle, None)

    def _wrote(self, count: int, handle: int, data: Any) -> None:
        if path := self._handles.get(handle):
            self._append(path, bytes(data[:count]))

    def _flushed(self, _: Any, handle: int) -> None:
        if path := self._handles.get(handle):
            self.log.append(Change(self._node(path.relative_to(self.root).parts)))

    def _written(self, _: Any, path: Path, data: bytes) -> None:
        if parts := self._parts(path):
            self._create(parts)
            self._append(path, data)

    def _appending(self, file: Any, path: Path, mode: str = "r", *rest: Any, **named: Any) -> None:
        """A line of text that is handed to the system at once, as metrics.jsonl does."""
        if (parts := self._parts(path)) and mode == "a":
            self._create(parts)
            self._handles[file.fileno()] = path
            write = file.write
            file.write = lambda text: (self._append(path, text.encode()), write(text))[1]

    def _create(self, parts: tuple[str, ...]) -> None:
        names = self._node(parts[:-1]).names
        assert names is not None
        if parts[-1] not in names:
            self._name(parts[:-1], {parts[-1]: Node()})

    def _append(self, path: Path, data: bytes) -> None:
        self.log.append(Change(self._node(path.relative_to(self.root).parts), data))


def _hooked(real: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    def hooked(*args: Any, **named: Any) -> Any:
        result = real(*args, **named)
        note(result, *args, **named)
        return result

    return hooked


def _apply(folder: Node, names: dict[str, Node | None]) -> None:
    assert folder.names is not None
    for name, node in names.items():
        if node is None:
            folder.names.pop(name, None)
        else:
            folder.names[name] = node


class AfterPowerLoss:
    """One of the states in which the disk may be found when the power failed after `moment` entries of the log."""

    def __init__(self, recorder: Recorder, moment: int, rng: random.Random) -> None:
        self._log, self._top, self._rng = recorder.log[:moment], recorder.top, rng
        self._kept = rng.choice((0.0, 0.3, 0.7, 1.0))  # how much of what was not flushed there is
        self.promised = [what for when, what in recorder.promised if when <= moment]
        flushed = {id(one.node): at for at, one in enumerate(self._log) if not one.data and not one.names}
        self._folders: dict[int, dict[str, Node]] = {}
        self._files: dict[int, bytes] = {}
        for at, one in enumerate(self._log):
            self._survive(one, at < flushed.get(id(one.node), -1))

    def _survive(self, one: Change, safe: bool) -> None:
        if one.data:
            before = self._files.get(id(one.node), b"")
            self._files[id(one.node)] = before + (one.data if safe else self._torn(one.data))
        elif one.names and (safe or self._rng.random() < self._kept):
            names = self._folders.setdefault(id(one.node), {})
            for name, node in one.names.items():
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node

    def _torn(self, data: bytes) -> bytes:
        blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        there = [block if self._rng.random() < self._kept else bytes(len(block)) for block in blocks]
        return b"".join(there[: self._rng.randint(0, len(there))] if self._rng.random() < 0.5 else there)

    def write(self, folder: Path) -> None:
        """Into `folder`, which is made."""
        self._write(self._top, folder)

    def _write(self, node: Node, path: Path) -> None:
        if node.names is None:
            path.write_bytes(self._files.get(id(node), b""))
            return
        path.mkdir()
        for name, inner in self._folders.get(id(node), {}).items():
            self._write(inner, path / name)


def states(recorder: Recorder, count: int, seed: int = 0) -> Iterator[AfterPowerLoss]:
    """Every moment in turn, as often as it takes."""
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        moment = number if number <= len(recorder.log) else rng.randint(0, len(recorder.log))
        yield AfterPowerLoss(recorder, moment, rng)
