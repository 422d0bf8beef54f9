"""Files of preferences (two answers compared, or one judged), which are not what is trained on here."""

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
    worse = [column for column in columns if any(word in column.casefold() for word in _WORSE)]
    better = [column for column in columns if _better(worse, column)]
    if not worse or not better or wanted != "auto" or set(better) & set(mapping.values()):
        return None
    return (
        f"the rows are preferences ({better[0]}, {worse[0]}), as DPO takes them, and only answers to imitate are "
        f"trained here; keep the better answers: data.format with data.columns (completion: {better[0]})"
    )


def _better(worse: Sequence[str], column: str) -> bool:
    """Whether the column is the counterpart of one of those: chosen of rejected, score_chosen of score_rejected."""
    pairs = (("rejected", "chosen"), ("rejected", "accepted"), ("dispreferred", "preferred"))
    named = {one.casefold().replace(bad, good) for one in worse for bad, good in pairs} - {*map(str.casefold, worse)}
    return column.casefold() in named


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
