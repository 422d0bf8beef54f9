"""The set of labels, and labels that look alike.

They are joined where only the encoding or white space differs, and told where more does.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Record, Row, Rows

Labels = tuple[str, ...]

MOST = 4096  # labels; with more, what is kept of how they are confused outgrows the memory
OWN = 100  # labels, from which most rows may not have one of their own
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))  # no width, and no part in how text is joined
_FAINT = _UNSEEN | dict.fromkeys(map(ord, "\u200c\u200d\ufe0e\ufe0f"))  # joiners, and the choice of a picture


def find_labels(records: Sequence[Record], given: Sequence[str] | None) -> Labels:
    """The labels in order: as the recipe gives them, else those of the training rows, whole numbers by value.

    Raises BadSource where there are not two different ones.
    """
    labels = tuple(given) if given is not None else tuple(sorted({one.answer or "" for one in records}, key=_rank))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        location = records[0].location if records else "data.train"
        shown = ", ".join(labels) or "none"
        raise BadSource(location, f"classification needs two different labels, and there is {shown}")
    return labels


def refuse_many(rows: Sequence[Row], column: str) -> None:
    """Raises BadSource where so many rows have a label of their own that there is nothing to choose between."""
    labels = (row.fields.get(column) for row in rows)
    count = len({str(label).strip() for label in labels if isinstance(label, (str, int, float))})
    own = count > OWN and count > len(rows) / 2
    if own or count > MOST:
        why = "nearly every row has its own" if own else f"{MOST:,} are the most"
        raise BadSource(
            rows[0].location,
            f"{count:,} different labels in {len(rows):,} rows: {why}; where the column holds answers, write its "
            "rows as prompt and completion (data.format: prompt, data.columns), else name another column as label",
        )


def _rank(label: str) -> tuple[bool, int, str]:
    whole = label.lstrip("-").isdecimal()
    return not whole, int(label) if whole else 0, label


def unknown_labels(records: Sequence[Record], labels: Labels) -> list[Problem]:
    """Rows whose label never occurs in the training rows."""
    known = set(labels)
    remedy = f"does not occur in the training rows ({', '.join(labels[:20])}); correct it"
    unknown = (record for record in records if record.answer not in known)
    return [(record.location, f"label {record.answer!r} {remedy}") for record in unknown]


def _folded(label: str) -> str:
    """The same for labels whose difference nobody can see or mean."""
    return " ".join(unicodedata.normalize("NFC", label.translate(_UNSEEN)).split())


class Spellings:
    """The commonest spelling of each label; labels that differ only in Unicode form or white space are one."""

    def __init__(self, labels: Iterable[str], given: Sequence[str] | None = None) -> None:
        """labels: of the training rows, one for each row. given: those of the recipe, whose spelling is kept."""
        counts = Counter(labels)
        ranked = [*(given or ()), *sorted(counts, key=lambda label: (-counts[label], label))]
        self._chosen: dict[str, str] = {}
        for label in ranked:
            self._chosen.setdefault(_folded(label), label)
        self._known = {label: self._chosen[_folded(label)] for label in counts} | {
            label: label for label in given or ()
        }

    def of(self, label: str) -> str:
        """The spelling that stands for the label; an unknown one is its own."""
        if label not in self._known:
            self._known[label] = self._chosen.get(_folded(label), label)
        return self._known[label]

    def notes(self, labels: Iterable[str]) -> list[str]:
        """What was joined among the labels of some rows, with how many rows each spelling has."""
        joined: dict[str, Counter[str]] = defaultdict(Counter)
        for label in labels:
            joined[self.of(label)][label] += 1
        return [
            f"labels that look the same joined as {label}: "
            + ", ".join(f"{spelling!a} ({count})" for spelling, count in spellings.most_common())
            for label, spellings in joined.items()
            if set(spellings) != {label}
        ]


def labels_in(rows: Iterable[Row], column: str) -> list[str]:
    """The labels of the rows that have one in words."""
    values = (row.fields.get(column) for row in rows)
    return [value.strip() for value in values if isinstance(value, str)]


def respelt(source: Rows, column: str, spellings: Spellings) -> Rows:
    """The rows with every label in the spelling that stands for it, and a note of what was joined."""
    notes = spellings.notes(labels_in(source.rows, column))
    if not notes:
        return source
    rows = []
    for row in source.rows:
        label = row.fields.get(column)
        if isinstance(label, str) and spellings.of(label.strip()) != label.strip():
            row = Row({**row.fields, column: spellings.of(label.strip())}, row.file, row.line)
        rows.append(row)
    return Rows(rows, source.bad, (*source.notes, *notes))


def look_alikes(labels: Sequence[str]) -> list[list[str]]:
    """Groups of different labels that a person may take for one: they differ in case, in form (full width), or as 1 and
    1.0 do.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[_looks(label)].append(label)
    return [group for group in groups.values() if len(group) > 1]


def _looks(label: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", label.translate(_FAINT)).casefold().split())
    whole, point, zeros = text.partition(".")
    return whole if point and whole.lstrip("-").isdecimal() and not zeros.strip("0") else text
