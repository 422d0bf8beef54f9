"""Collects problems of rows and files, and raises them once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune.data.rows import Prepared, Problem, Split, Task
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from finetune.text import one_line

SHOWN = 20


class BadSource(DataError):
    """A source that cannot be read, or whose rows together are not what the recipe needs."""

    def __init__(self, location: str, reason: str, bad: Sequence[Problem] = ()) -> None:
        """bad: rows that could not be read; what the good rows lack may be in them."""
        super().__init__(f"{location}: {reason}", *listed(bad))
        self.problem: Problem = location, reason


@contextmanager
def named_by(key: str, source: str) -> Iterator[None]:
    """Inside, a BadSource of the whole source, and not of a line in it, also names the recipe's key; "": none does."""
    try:
        yield
    except BadSource as error:
        location, reason = error.problem
        if not key or location != source:
            raise
        raise BadSource(f"{key}: {location}", reason) from None


def refuse_rows(bad: Sequence[Problem], skipping: str = "") -> None:
    """Raises DataError, where there are bad rows, with the first 20 and their number.

    skipping: what leaving them out needs beside data.on_error.
    """
    if bad:
        count = len(bad)
        raise DataError(
            *listed(bad),
            f"{count} bad row{'s' if count > 1 else ''}; fix {'them' if count > 1 else 'it'}, "
            f"or set data.on_error: skip{skipping} to leave bad rows out",
        )


def refuse(prepared: Prepared, recipe: Recipe) -> None:
    """Raises DataError for the first of the problems that stop training, if there is one."""
    all_splits = (prepared.train, prepared.valid, prepared.test) if prepared.train.rows else (prepared.test,)
    splits = [split for split in all_splits if split]
    skips = recipe.data.on_error == "skip"
    for problem in (problem for name, problem in prepared.broken if name not in {split.name for split in splits}):
        raise BadSource(*problem)
    for split in splits:
        if not skips:
            refuse_rows(split.bad, _skipping(split.bad, split, recipe))
        for problem in (problem for name, problem in prepared.broken if name == split.name):
            raise BadSource(*problem, split.bad)
    for split in splits:
        if not skips:
            refuse_rows(split.refused, _skipping(split.refused, split, recipe))
        refuse_rows(split.too_long)
        for problem in _shortage(split, recipe, prepared.task):
            raise DataError(*(listed(split.left_out) if split.examples else ()), ": ".join(problem))


def faults(prepared: Prepared, recipe: Recipe) -> list[Problem]:
    """All that stops training beside bad rows: unusable files, rows that are too long, splits that lose too much."""
    splits = prepared.splits
    broken = [problem for _, problem in prepared.broken]
    broken += [problem for split in splits for problem in split.too_long]
    return broken + [problem for split in splits for problem in _shortage(split, recipe, prepared.task)]


def _shortage(split: Split, recipe: Recipe, task: Task) -> Iterator[Problem]:
    """That a split has no row left, or would lose more of its rows (of plain text, of its tokens) than the recipe
    allows, and the remedies.
    """
    if not split.examples:
        why = f": {': '.join(split.left_out[0])}" if split.left_out else ""
        yield f"data.{split.name}", f"no row is left{why}; fix the rows, or raise train.max_length"
        return
    count = _rows(split.left_out if recipe.data.on_error == "skip" else split.dropped)
    allowed = recipe.data.max_dropped
    if count > allowed * split.rows:
        prompt = "set train.truncation: prompt, " if recipe.train.truncation in ("end", "drop") else ""
        yield (
            f"data.{split.name}",
            (
                f"{count:,} of {split.rows:,} rows ({count / split.rows:.1%}) would be left out, and data.max_dropped "
                f"allows {allowed:g}; fix them, raise train.max_length, {prompt}or set data.max_dropped: "
                f"{_at_least(count / split.rows)}"
            ),
        )
    elif task == "text" and split.lost_tokens > allowed * sum(split.lengths):
        share = split.lost_tokens / sum(split.lengths)
        yield (
            f"data.{split.name}",
            (
                f"{share:.1%} of its tokens would be left out, and data.max_dropped allows {allowed:g}; set "
                f"data.long_rows: split, raise train.max_length, or set data.max_dropped: {_at_least(share)}"
            ),
        )


def _skipping(bad: Sequence[Problem], split: Split, recipe: Recipe) -> str:
    """What leaving these rows out needs beside data.on_error: skip."""
    share = _rows(bad) / max(split.rows, 1)
    return f" and data.max_dropped: {_at_least(share)}" if share > recipe.data.max_dropped else ""


def _rows(problems: Sequence[Problem]) -> int:
    """How many, of which an unrolled conversation may have lost several parts."""
    return len({location for location, _ in problems})


def _at_least(share: float) -> str:
    return f"{min(math.ceil(share * 100) / 100, 0.99):g}"


def listed(problems: Sequence[Problem]) -> list[str]:
    """The first 20, a line each, and how many more there are."""
    lines = [one_line(f"{location}: {reason}") for location, reason in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more")
    return lines
