"""Bad rows, gathered and raised once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from finetune.text import harmless

Problem = tuple[str, str]  # (place, reason with its remedy)
OnError = Literal["stop", "skip"]
SHOWN = 20


def settle(problems: Sequence[Problem], on_error: OnError, also: str = "") -> None:
    """Raise a DataError that lists the first 20 bad rows and their number, unless they are to be skipped.

    also: what skipping them needs beside data.on_error.
    """
    if not problems or on_error == "skip":
        return
    count = len(problems)
    raise DataError(
        f"{listed(problems)}\n{count} bad row{'s' if count > 1 else ''}; mend {'them' if count > 1 else 'it'}, "
        f"or set data.on_error: skip{also} to leave bad rows out"
    )


def skipping(bad: Sequence[Problem], rows: int, recipe: Recipe) -> str:
    """What leaving these rows of a split out needs beside data.on_error: skip."""
    share = _dropped(bad) / max(rows, 1)
    return f" and data.max_dropped: {_enough(share)}" if share > recipe.data.max_dropped else ""


def too_many(split: str, rows: int, dropped: Sequence[Problem], recipe: Recipe) -> Problem | None:
    """That a split would lose more of its rows than the recipe allows, and the remedies."""
    count, allowed = _dropped(dropped), recipe.data.max_dropped
    if count <= allowed * rows:
        return None
    prompt = "set train.truncation: prompt, " if recipe.train.truncation in ("end", "drop") else ""
    return f"data.{split}", (
        f"{count:,} of {rows:,} rows ({count / rows:.1%}) would be left out, and data.max_dropped allows {allowed:g}; "
        f"mend them, raise train.max_length, {prompt}or set data.max_dropped: {_enough(count / rows)}"
    )


def _dropped(problems: Sequence[Problem]) -> int:
    """Rows, of which an unrolled conversation may have lost several parts."""
    return len({place for place, _ in problems})


def _enough(share: float) -> str:
    return f"{min(math.ceil(share * 100) / 100, 0.99):g}"


@contextmanager
def naming(bad: Sequence[Problem]) -> Iterator[None]:
    """What the good rows lack may be in the bad ones: they are named too."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}\n{listed(bad)}".strip()) from None


def listed(problems: Sequence[Problem]) -> str:
    """The first 20, one a line, and how many more there are."""
    lines = [harmless(f"{place}: {reason}") for place, reason in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more")
    return "\n".join(lines)
