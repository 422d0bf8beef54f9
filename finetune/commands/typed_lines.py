"""Lines that a person types, edited and remembered as in a shell."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.disk.digests import cache_folder

PROMPT = "> "
_REMEMBERED = 1000  # lines


class TypedLines:
    """In a terminal the arrows edit the line and bring earlier ones back, also those of other days; they are kept in
    `file`, for its owner alone. From a pipe, lines are read and nothing is kept.
    """

    def __init__(self, file: Path | None = None) -> None:
        """file: where lines are kept; `chat_history` beside what else is remembered for the user if not given."""
        self._file = file or cache_folder() / "chat_history"
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _readline() if self._terminal else None
        if self._readline:
            with suppress(OSError):  # there is none yet, or it cannot be read
                self._readline.read_history_file(self._file)

    def ask(self) -> str:
        """The next line, without white space around it; empty at the end. Ctrl-C in a terminal begins the line anew."""
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                return ""
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                print()
            else:
                self._keep()
                return line

    def _keep(self) -> None:
        """After every line, since a chat may be killed. Nothing depends on it."""
        if self._readline is None:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600))
            self._readline.set_history_length(_REMEMBERED)
            self._readline.write_history_file(self._file)


def _readline() -> Any:
    try:
        import readline  # input() edits lines once it is loaded
    except ImportError:  # Windows, whose console edits lines by itself
        return None
    return readline
