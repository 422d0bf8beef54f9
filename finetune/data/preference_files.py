"""Recognises preference files, which a recipe for single answers must not take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row

_WORSE = ("rejected", "dispreferred")
_ANSWERS = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))


def refuse_preferences(
    rows: Sequence[Row], columns: Sequence[str], wanted: str, mapping: Mapping[str, str], bad: Sequence[Problem]
) -> None:
    """Raises BadSource for rows that compare or judge answers: trained as they stand, the bad ones are learned too.

    Two answers that are compared may be told apart by the recipe's own words (data.format, data.columns); answers that
    are judged one by one may not, since each row has the same columns.
    """
    if reason := _compared(columns, wanted, mapping) or _judged(rows, columns, mapping):
        raise BadSource(rows[0].location, reason, bad)


def _compared(columns: Sequence[str], wanted: str, mapping: Mapping[str, str]) -> str | None:
    pairs = better_columns(columns)
    if not pairs or wanted != "auto" or {better for better, _ in pairs} & set(mapping.values()):
        return None
    better, worse = pairs[0]
    return (
        f"the rows are preferences ({better}, {worse}), as DPO takes them; to learn from pairs set preferences: {{}}, "
        f"to imitate the better answers data.format with data.columns (completion: {better})"
    )


def better_columns(columns: Sequence[str]) -> list[tuple[str, str]]:
    """(better, worse) of columns that are counterparts: chosen of rejected, score_chosen of score_rejected."""
    worse = [column for column in columns if any(word in column.casefold() for word in _WORSE)]
    names = (("rejected", "chosen"), ("rejected", "accepted"), ("dispreferred", "preferred"))
    found = []
    for column in columns:
        for bad in worse:
            named = {bad.casefold().replace(old, new) for old, new in names} - {*map(str.casefold, worse)}
            if column.casefold() in named:
                found.append((column, bad))
    return found


def _judged(rows: Sequence[Row], columns: Sequence[str], mapping: Mapping[str, str]) -> str | None:
    if not any(all(mapping.get(part, part) in columns for part in parts) for parts in _ANSWERS):
        return None
    for column in ("label", "kto_tag"):
        verdicts = [str(row.fields[column]).casefold() for row in rows if row.fields.get(column) is not None]
        if column in columns and verdicts and set(verdicts) <= {"true", "false"}:
            return (
                f"the rows are answers with a verdict ({column}: true or false), as KTO takes them, and only answers "
                f"to imitate are trained here; keep the rows whose {column} is true, and take the column out"
            )
    return None
