"""Bad rows, gathered and raised once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from finetune.data.encoding import harmless
from finetune.errors import DataError

Problem = tuple[str, str]  # (place, reason with its remedy)
OnError = Literal["stop", "skip"]
SHOWN = 20


def settle(problems: Sequence[Problem], on_error: OnError) -> None:
    """Raise a DataError that lists the first 20 bad rows and their number, unless they are to be skipped."""
    if not problems or on_error == "skip":
        return
    count = len(problems)
    raise DataError(
        f"{listed(problems)}\n{count} bad row{'s' if count > 1 else ''}; mend {'them' if count > 1 else 'it'}, "
        "or set data.on_error: skip to leave bad rows out"
    )


def listed(problems: Sequence[Problem]) -> str:
    """The first 20, one a line, and how many more there are."""
    lines = [harmless(f"{place}: {reason}") for place, reason in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more")
    return "\n".join(lines)
