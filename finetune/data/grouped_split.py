"""Validation split that keeps duplicates and near duplicates on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import NamedTuple

from finetune.data.near_duplicates import Signatures
from finetune.data.row_words import content, digest, question
from finetune.data.rows import Record
from finetune.data.split import choose
from finetune.events import Progress

WORDS = "words"  # how an identity names this way of parting; runs that name none were parted by `split.set_apart`
ALIKE = 50  # rows that are nearly the same, beyond which they may be one template's, and no repeats
ROUNDS = 10  # of looking across the sides again; nearly always the second finds nothing

Pairs = Collection[tuple[int, int]]  # of rows


class Parted(NamedTuple):
    train: list[Record]
    valid: list[Record]
    alike: int  # validation rows that are nearly the same as a training row


def part(records: Sequence[Record], fraction: float, seed: int, labelled: bool) -> Generator[Progress, None, Parted]:
    """Train and validation, both in the file's order and neither empty.

    labelled: the answers are labels; rows of one text stay together whatever their label, and each label gives its
    share. Rows of the same words never part. Rows of nearly the same words part only where more are alike than
    validation shall have (and more than 50: a template wrote them), or where it would miss its size by more than half.
    Raises BadSource as `choose` does.
    """
    same = [digest(question(record, labelled)) for record in records]
    chosen = by_words = choose(records, same, fraction, seed, labelled)
    wanted = max(1, round(fraction * len(records)))
    near: set[tuple[int, int]] = set()
    signatures = Signatures(_texts(records, labelled))
    yield from signatures.read(len(records))
    for _ in range(ROUNDS):
        found = set(_pairs(signatures, chosen, len(records)))
        near |= found
        sides = _joined(same, near, max(ALIKE, wanted))
        if all(sides[row] != sides[other] for row, other in _across(found, chosen)):
            break
        chosen = choose(records, sides, fraction, seed, labelled)
        if abs(len(chosen) - wanted) > max(wanted / 2, abs(len(by_words) - wanted)):
            chosen = by_words
            break
    train = [record for row, record in enumerate(records) if row not in chosen]
    alike = {row if row in chosen else other for row, other in _across(near, chosen)}
    return Parted(train, [records[row] for row in sorted(chosen)], len(alike))


def _texts(records: Sequence[Record], labelled: bool) -> Callable[[int], str]:
    """The text of a row; none where an earlier one has the same."""
    first: dict[bytes, int] = {}
    alone = [first.setdefault(digest(content(record, labelled)), row) == row for row, record in enumerate(records)]
    return lambda row: content(records[row], labelled) if alone[row] else ""


def _pairs(signatures: Signatures, chosen: Collection[int], count: int) -> Iterator[tuple[int, int]]:
    """Nearly the same rows, as `check` finds them: those for training first."""
    order = [*(row for row in range(count) if row not in chosen), *sorted(chosen)]
    return ((row, other) for row, other, _ in signatures.pairs(order))


def _across(pairs: Pairs, chosen: Collection[int]) -> list[tuple[int, int]]:
    return [(row, other) for row, other in pairs if (row in chosen) != (other in chosen)]


def _joined(same: Sequence[bytes], near: Pairs, most: int) -> list[bytes]:
    """What each row shares with those of its side: the first of all that are nearly the same; where those are more than
    `most`, its words alone.
    """
    leader: dict[bytes, bytes] = {}

    def lead(words: bytes) -> bytes:
        while (above := leader.get(words, words)) != words:
            leader[words] = leader.get(above, above)  # the way grows shorter each time that it is gone
            words = above
        return words

    for row, other in near:
        one, two = sorted((lead(same[row]), lead(same[other])))
        leader[two] = one
    leaders = [lead(words) for words in same]
    sizes = Counter(leaders)
    return [found if sizes[found] <= most else words for found, words in zip(leaders, same, strict=True)]
