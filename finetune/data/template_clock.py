"""The time that chat templates see: fixed for the whole run, and part of its identity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

# What Llama 3's templates write where they are told no date. Runs that have recorded no time keep it.
DATE = "26 Jul 2024"
_READS = re.compile(r"\b(strftime_now|date_string|current_date)\b")


def now() -> datetime:
    """The time that a run is given at its start, to the second."""
    return datetime.now().replace(microsecond=0)


def reads_clock(template: str) -> bool:
    return bool(_READS.search(template))


def clock_values(clock: datetime | None) -> dict[str, str]:
    """What a rendering is told of the time, as JSON can hold it."""
    return {"date_string": DATE} if clock is None else {"clock": clock.isoformat()}


def clock_names(values: Mapping[str, str], template: str) -> tuple[dict[str, str], type | None]:
    """The names that a template finds, of `clock_values`, and what stands for `datetime` in what renders it.

    None: the machine's own clock, for runs that have recorded no time.
    """
    names = dict(values)
    if "clock" not in names:
        return names, None
    clock = datetime.fromisoformat(names.pop("clock"))
    names["date_string"] = clock.strftime("%d %b %Y")
    if "strftime_now" not in template:  # those that can ask for the date write it in their own form
        names["current_date"] = clock.strftime("%Y-%m-%d")
    return names, type("Fixed", (), {"now": staticmethod(lambda: clock)})
