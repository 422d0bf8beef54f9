"""Guesses the meaning of columns with uninformative names from their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.data.rows import Row
from finetune.data.sources import TABLES, ending_of
from finetune.text import harmless, shorten

LOOKED_AT = 5_000  # rows
LABEL_LENGTH = 60  # characters, of the longest label


class Column(NamedTuple):
    """What a column holds, in numbers."""

    name: str
    filled: float  # the share of rows that have something there
    distinct: int
    length: float  # characters, on average
    longest: int
    words: float  # of letters, on average
    plain: bool  # every value is text or a whole number


def by_content(rows: Sequence[Row]) -> dict[str, str]:
    """Standard name -> column, where what the columns hold leaves no doubt; empty elsewhere.

    A column of few different, short values is the label; the longest text is the text. Columns that number or date
    the rows are neither.
    """
    rows = rows[:LOOKED_AT]
    names = list(dict.fromkeys(column for row in rows for column in row.fields))
    if talks := _conversations(rows, names):
        return talks if len(talks) == 1 else {}
    columns = [_look(name, [row.fields.get(name) for row in rows]) for name in names]
    texts = sorted((column for column in columns if _is_text(column)), key=lambda column: -column.length)
    if not texts or (len(texts) > 1 and texts[1].length > texts[0].length / 2):
        return {}
    labels = [column for column in columns if column is not texts[0] and _is_label(column, len(rows))]
    if len(labels) > 1:
        return {}
    if labels:
        return {"text": texts[0].name, "label": labels[0].name}
    return {"text": texts[0].name} if len(texts) == 1 else {}


def _conversations(rows: Sequence[Row], names: Sequence[str]) -> dict[str, str]:
    """Columns of turns, by which keys a turn has."""
    found = {}
    for name in names:
        value = next((row.fields[name] for row in rows if row.fields.get(name)), None)
        turn = value[0] if isinstance(value, list) else None
        if isinstance(turn, Mapping):
            kinds = {"messages": {"role", "content"}, "conversations": {"from", "value"}}
            found.update({part: name for part, keys in kinds.items() if keys <= set(turn)})
    return found


def _look(name: str, values: Sequence[Any]) -> Column:
    present = [value for value in values if value is not None and str(value).strip()]
    texts = [str(value) for value in present]
    count = max(len(texts), 1)
    return Column(
        name=name,
        filled=len(texts) / max(len(values), 1),
        distinct=len(set(texts)),
        length=sum(map(len, texts)) / count,
        longest=max(map(len, texts), default=0),
        words=sum(_words(text) for text in texts) / count,
        plain=all(
            isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer()) for value in present
        ),
    )


def _words(text: str) -> int:
    """Words with letters; in scripts that part no words, three letters are one."""
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    wide = sum(char >= "\u2e80" for char in text)
    return max(words, wide // 3)


def _is_text(column: Column) -> bool:
    return column.plain and column.filled > 0.9 and column.words >= 2 and column.distinct > 1


def _is_label(column: Column, rows: int) -> bool:
    few = 2 <= column.distinct <= rows / 2
    return column.plain and column.filled > 0.9 and few and column.longest <= LABEL_LENGTH


def headerless(rows: Sequence[Row]) -> str | None:
    """Why a table seems to begin with a row, and what to do; None where its first line may hold names.

    A name is no value of its own column. It may be a question, as in surveys, but not every name is a sentence.
    """
    if ending_of(rows[0].file) not in TABLES:
        return None
    names = list(rows[0].fields)
    rows = rows[:LOOKED_AT]
    repeated = [name for name in names if sum(row.fields.get(name) == name for row in rows) > len(rows) / 100]
    sentences = all(len(name.split()) > 4 and not name.rstrip().endswith(("?", ":")) for name in names)
    if not repeated and not sentences:
        return None
    parts = {column: part for part, column in by_content(rows).items()}
    better = [parts.get(name, f"column{number}") for number, name in enumerate(names, 1)]
    shown = harmless(", ".join(shorten(name, 30) for name in names[:6]))
    return (
        f"the first line ({shown}) is a row and not the names of the columns; put a line of names before it, such as "
        f"{' and '.join(better)}, separated as the others are"
    )
