"""metrics.jsonl: one JSON line per event. A resumed run first removes the lines that it will repeat."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from finetune.disk.atomic import disk_errors, write_file
from finetune.disk.run_files import check_values, read_regular
from finetune.errors import DiskError, Incompatible
from finetune.events import CheckpointDue, Event, Passing, StepDone

_EVENTS = {kind.__name__: kind for kind in Event.__subclasses__() if kind is not Passing}
_REMEDY = "fix or delete that line, or the whole file"


class MetricsFile:
    """Appends events to `path`. Floats are written so that reading gives the same bits back."""

    def __init__(self, path: Path) -> None:
        """Continues a file that exists; repairs its last line. Raises DiskError, Incompatible."""
        self._path = path
        self._file: IO[str] | None = None
        self._bytes = 0  # in the file
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
            line = json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n"
            self._file.write(line)
            self._file.flush()
        self._bytes += len(line)  # json.dumps writes ASCII
        self._check()

    def _check(self) -> None:
        """Raises DiskError where the file at this path is no longer the one with all that was recorded."""
        assert self._file is not None
        with disk_errors(self._path):
            there, ours = self._path.stat(), os.fstat(self._file.fileno())
        if not os.path.samestat(there, ours) or there.st_size != self._bytes:
            raise DiskError(
                f"{self._path}: deleted, cut, replaced or written by another program while the run went on; "
                "the steps since the last checkpoint are done again when it is resumed"
            )

    def sync(self) -> None:
        """Every recorded line is on the disk, even if the machine then loses power. Raises DiskError."""
        assert self._file is not None
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Removes every event of a later step: all of them or none. Raises DiskError, Incompatible."""
        self.close()
        if (data := read_regular(self._path)) is not None:
            lines = _lines(self._path, data)
            earlier = [line for line, event in lines if event.step <= step]
            if len(earlier) < len(lines) or (data and not data.endswith(b"\n")):
                write_file(self._path, "".join(f"{line}\n" for line in earlier))
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
            self._bytes = os.fstat(self._file.fileno()).st_size

    def missing(self, step: int) -> int:
        """How many of the first `step` steps have no line in the file. Raises DiskError, Incompatible."""
        recorded = {event.step for event in read(self._path) if isinstance(event, StepDone)}
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
    if (data := read_regular(path)) is None:
        raise DiskError(f"{path}: there is no such file; the run's folder was changed while it was in use")
    return [event for _, event in _lines(path, data)]


def _lines(path: Path, data: bytes) -> list[tuple[str, Event]]:
    """Every line with its event, without the half line that a kill leaves at the end."""
    lines = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            kind = _EVENTS[values.pop("event")]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _unreadable(path, number) from None
        lines.append((line, check_values(values, kind, f"{path}:{number}", _REMEDY)))
    return lines


def _unreadable(path: Path, number: int) -> Incompatible:
    return Incompatible(f"{path}:{number}: not an event of this version; {_REMEDY}")
