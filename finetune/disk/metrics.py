"""metrics.jsonl: one JSON line an event, written as it happens; what a resumed run repeats is cut off first."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from finetune.disk.atomic import disk_errors, write_file
from finetune.errors import Incompatible
from finetune.events import Event, StepDone

_EVENTS = {kind.__name__: kind for kind in Event.__subclasses__()}


class MetricsFile:
    """A sink that appends to `path`. Floats are written so that reading gives the same bits back."""

    def __init__(self, path: Path) -> None:
        """Goes on with a file that is there. Raises DiskError, Incompatible."""
        self._path = path
        self._file: IO[str] | None = None
        self.truncate_after(sys.maxsize)  # a killed run may have left half a line

    def handle(self, event: Event) -> None:
        """One line, handed to the system at once. Raises DiskError."""
        assert self._file is not None
        with disk_errors(self._path):
            self._file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """What was handled is on the disk, whatever becomes of the machine. Raises DiskError."""
        assert self._file is not None
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drops every event of a later step, whole or not at all. Raises DiskError, Incompatible."""
        self.close()
        if self._path.exists():
            lines = _lines(self._path)
            kept = [line for line, values in lines if values["step"] <= step]
            if len(kept) < len(lines) or not _ends_a_line(self._path):
                write_file(self._path, "".join(f"{line}\n" for line in kept))
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def missing(self, step: int) -> int:
        """How many of the first `step` steps the file does not tell of. Raises DiskError, Incompatible."""
        told = {values["step"] for _, values in _lines(self._path) if values["event"] == StepDone.__name__}
        return len(set(range(1, step + 1)) - told)

    def close(self) -> None:
        """Raises DiskError where the last lines no longer fit."""
        if self._file is not None:
            file, self._file = self._file, None
            with disk_errors(self._path):
                file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[Event]:
    """The events of a file, in order. Raises DiskError; Incompatible for a line that is no event of this version."""
    events = []
    for number, (_, values) in enumerate(_lines(path), start=1):
        kind = _EVENTS.get(values.pop("event"))
        try:
            if kind is None:
                raise TypeError
            events.append(kind(**values))
        except TypeError:
            raise _unreadable(path, number) from None
    return events


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line with its values; half a line at the end, which a kill leaves, is left out."""
    with disk_errors(path):
        text = path.read_bytes().decode("utf-8", errors="replace")
    found = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int) or not isinstance(values["event"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise _unreadable(path, number) from None
        found.append((line, values))
    return found


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _unreadable(path: Path, number: int) -> Incompatible:
    return Incompatible(f"{path}:{number}: not an event of this version; mend or delete that line, or the whole file")
