"""metrics.jsonl: one JSON line per event, written as it happens. A resumed run first removes what it will repeat."""

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
from finetune.events import CheckpointDue, Event, Passing, StepDone

_EVENTS = {kind.__name__: kind for kind in Event.__subclasses__() if kind is not Passing}


class MetricsFile:
    """Appends events to `path`. Floats are written so that reading gives the same bits back."""

    def __init__(self, path: Path) -> None:
        """Continues a file that exists; repairs its last line. Raises DiskError, Incompatible."""
        self._path = path
        self._file: IO[str] | None = None
        self.truncate_after(sys.maxsize)  # a killed run may have left half a line

    def record(self, event: Event) -> None:
        """One line, handed to the system at once; no line for events that only pass.

        At CheckpointDue all lines before it are on the disk when this returns. Raises DiskError.
        """
        if isinstance(event, CheckpointDue):
            self.sync()
        if isinstance(event, Passing):
            return
        assert self._file is not None
        with disk_errors(self._path):
            self._file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Every recorded line is on the disk, even if the machine then loses power. Raises DiskError."""
        assert self._file is not None
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Removes every event of a later step: all of them or none. Raises DiskError, Incompatible."""
        self.close()
        if self._path.exists():
            lines = _lines(self._path)
            earlier = [line for line, values in lines if values["step"] <= step]
            if len(earlier) < len(lines) or not _ends_a_line(self._path):
                write_file(self._path, "".join(f"{line}\n" for line in earlier))
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def missing(self, step: int) -> int:
        """How many of the first `step` steps have no line in the file. Raises DiskError, Incompatible."""
        recorded = {values["step"] for _, values in _lines(self._path) if values["event"] == StepDone.__name__}
        return len(set(range(1, step + 1)) - recorded)

    def close(self) -> None:
        """Raises DiskError when the last lines no longer fit on the disk."""
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
    """The events of a file, in order. Raises DiskError, and Incompatible for a line that this version cannot read."""
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
    """Every line with its values, without the half line that a kill leaves at the end."""
    with disk_errors(path):
        text = path.read_bytes().decode("utf-8", errors="replace")
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int) or not isinstance(values["event"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise _unreadable(path, number) from None
        lines.append((line, values))
    return lines


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _unreadable(path: Path, number: int) -> Incompatible:
    return Incompatible(f"{path}:{number}: not an event of this version; fix or delete that line, or the whole file")
