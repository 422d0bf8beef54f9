"""Training rows with the same or nearly the same input and different answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from finetune.data.near_duplicates import FEWEST_WORDS, NEAR, Signatures, similarity
from finetune.data.row_words import question, words
from finetune.data.rows import Record
from finetune.events import Progress

COMPARED = 20  # rows of each other answer that a row is compared with


@dataclass(frozen=True)
class Clash:
    """What speaks against a row: another one of the same question."""

    location: str  # of the other row
    answer: str  # its answer
    similarity: float  # 1: the same words


def clashes(records: Sequence[Record], labelled: bool) -> Generator[Progress, None, dict[str, Clash]]:
    """By location, of every row that has such another; the most similar, and of equals the first.

    labelled: the answers are labels. Open answers may differ where questions are nearly the same, so theirs must be the
    same; so must those of fewer than six words.
    """
    texts = [question(record, labelled) for record in records]
    joined = _Joined(len(records))
    same: dict[str, int] = {}
    for row, text in enumerate(texts):
        joined.join(row, same.setdefault(" ".join(words(text)) or text, row))
    if not labelled:
        return _found(records, texts, joined.groups())
    firsts = [row for row in range(len(records)) if joined.first(row) == row]
    signatures = Signatures(lambda row: texts[row] if joined.first(row) == row else "")
    yield from signatures.read(len(records))
    for row, other, _ in list(signatures.pairs(firsts)):
        joined.join(row, other)
    return _found(records, texts, joined.groups())


class _Joined:
    """Rows that belong together, each group by its first row."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def first(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, row: int, other: int) -> None:
        low, high = sorted((self.first(row), self.first(other)))
        self._parent[high] = low

    def groups(self) -> list[list[int]]:
        made: dict[int, list[int]] = defaultdict(list)
        for row in range(len(self._parent)):
            made[self.first(row)].append(row)
        return [group for group in made.values() if len(group) > 1]


def _found(records: Sequence[Record], texts: Sequence[str], groups: Sequence[Sequence[int]]) -> dict[str, Clash]:
    found: dict[str, Clash] = {}
    for group in groups:
        by_answer: dict[str, list[int]] = defaultdict(list)
        for row in group:
            by_answer[(records[row].answer or "").strip()].append(row)
        for row in group if len(by_answer) > 1 else ():
            mine = (records[row].answer or "").strip()
            rivals = [other for answer, rows in by_answer.items() if answer != mine for other in rows[:COMPARED]]
            alike, first = max((_alike(texts[row], texts[other]), -other) for other in rivals)
            other = records[-first]
            if alike >= NEAR:
                found[records[row].location] = Clash(other.location, other.answer or "", alike)
    return found


def _alike(text: str, other: str) -> float:
    """1 for the same words; shorter texts than three words have no runs to compare."""
    a, b = words(text), words(other)
    if a == b:
        return 1.0
    return round(similarity(text, other), 3) if min(len(a), len(b)) >= FEWEST_WORDS else 0.0
