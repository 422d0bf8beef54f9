"""Standard output and standard error that outlive their reader: a run does not end because `tee` or a terminal did."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import Any

_GONE = {errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET}  # EIO: a terminal that was closed


class _Outliving(io.FileIO):
    """Drops what it is given once nobody can read it any more."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on `sys.stdout` and `sys.stderr` take every line, whether or not it is read. Files stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue  # a caller's own
        if os.name == "nt" or stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            continue
        stream.flush()
        outliving = io.TextIOWrapper(
            io.BufferedWriter(_Outliving(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, outliving)
