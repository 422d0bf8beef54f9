"""Exact and near duplicates, and rows that are in more than one split."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from finetune.data.near_duplicates import Signatures
from finetune.data.row_words import content, digest, question
from finetune.data.rows import Record, Split
from finetune.events import Progress


@dataclass(frozen=True)
class Pair:
    """A row, and the earlier one that it repeats."""

    location: str
    other: str  # its location
    similarity: float  # 1: the same words


@dataclass
class Duplicates:
    exact: list[Pair] = field(default_factory=list)  # both in train
    near: list[Pair] = field(default_factory=list)  # both in train
    leaks: list[tuple[str, str, Pair]] = field(default_factory=list)  # (split, earlier split, the rows)


@dataclass(frozen=True)
class _Rows:
    """The rows of all splits, train first."""

    records: list[Record]
    splits: list[str]
    labelled: bool

    def text(self, row: int) -> str:
        return content(self.records[row], self.labelled)


def find_duplicates(splits: Sequence[Split], labelled: bool) -> Generator[Progress, None, Duplicates]:
    """splits: train first. labelled: the answers are labels, and two rows of one text repeat each other whatever they
    are labelled.

    A held-out row leaks when train holds its question; or, nearly, the whole of it.
    """
    records = [record for split in splits for record in split.records]
    rows = _Rows(records, [split.name for split in splits for _ in split.records], labelled)
    duplicates = Duplicates()
    repeated = _exact(rows, duplicates)
    signatures = Signatures(lambda row: "" if row in repeated else rows.text(row))
    yield from signatures.read(len(records))
    for row, other, similarity in signatures.pairs(range(len(records))):
        _note(rows, row, other, similarity, duplicates)
    return duplicates


def _exact(rows: _Rows, duplicates: Duplicates) -> set[int]:
    """Notes rows of the same words; returns them."""
    whole: dict[bytes, int] = {}
    questions: dict[bytes, int] = {}
    repeated = set()
    for row, record in enumerate(rows.records):
        text = content(record, rows.labelled)
        first = whole.setdefault(digest(text), row)
        leaked = questions.setdefault(digest(question(record, rows.labelled)), row)
        if rows.splits[leaked] != rows.splits[row]:
            pair = Pair(record.location, rows.records[leaked].location, 1.0)
            duplicates.leaks.append((rows.splits[row], rows.splits[leaked], pair))
            repeated.add(row)
        elif first != row:
            repeated.add(row)
            if rows.splits[row] == "train":
                duplicates.exact.append(Pair(record.location, rows.records[first].location, 1.0))
    return repeated


def _note(rows: _Rows, row: int, other: int, similarity: float, duplicates: Duplicates) -> None:
    pair = Pair(rows.records[row].location, rows.records[other].location, round(similarity, 3))
    if rows.splits[row] != rows.splits[other]:
        duplicates.leaks.append((rows.splits[row], rows.splits[other], pair))
    elif rows.splits[row] == "train":
        duplicates.near.append(pair)
