"""Near duplicates: MinHash signatures of three-word shingles."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from finetune.data.row_words import words
from finetune.events import Progress

NEAR = 0.8  # Jaccard similarity of the three-word runs, from which rows count as nearly the same
FEWEST_WORDS = 6  # shorter rows are compared exactly alone
BANDS, BAND = 16, 4  # 64 permutations: a pair at 0.8 shares a band with probability 1 - (1 - 0.8^4)^16 = 0.9998
_RUN = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
TOGETHER = 1000  # rows whose signatures are computed at a time


def _permutations(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors and summands of `minhash`, the same in every run: as datasketch 2.0 draws them."""
    draw = np.random.RandomState(1)
    factors = draw.randint(0, 2**31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, draw.randint(0, 2**32, count, dtype=np.uint32)


_PERMUTATIONS = _permutations(BANDS * BAND)


class Signatures:
    """The rows that are long enough to be compared, each with its signature."""

    def __init__(self, text: Callable[[int], str]) -> None:
        """text: of a row; a row without text, or with less than six words, is compared with none."""
        self._text = text
        self._places: dict[int, int] = {}  # row -> its line in the signatures
        self._signatures = np.zeros((0, BANDS * BAND), np.uint32)

    def read(self, count: int) -> Generator[Progress, None, None]:
        """The signatures of the rows from 0 to `count` - 1."""
        made = np.zeros((count, BANDS * BAND), np.uint32)
        for start in range(0, count, TOGETHER):
            block = range(start, min(start + TOGETHER, count))
            runs, counts = shingles(self._text(row) for row in block)
            enough = counts > FEWEST_WORDS - 3
            chosen = [row for row, long in zip(block, enough, strict=True) if long]
            first = len(self._places)
            self._places.update((row, first + i) for i, row in enumerate(chosen))
            made[first : first + len(chosen)] = minhash(runs[np.repeat(enough, counts)], counts[enough])
            yield Progress(0, "data: comparing rows", block.stop, count)
        self._signatures = made[: len(self._places)]

    def pairs(self, rows: Iterable[int]) -> Iterator[tuple[int, int, float]]:
        """(row, earlier row, Jaccard similarity from NEAR to 1) of those that are nearly the same, one at most for each
        row. rows: which, in their order.
        """
        ordered = [row for row in rows if row in self._places]
        signatures = self._signatures[[self._places[row] for row in ordered]]
        for row, other in ((ordered[a], ordered[b]) for a, b in candidates(signatures)):
            alike = similarity(self._text(row), self._text(other))
            if alike >= NEAR:
                yield row, other, alike


def similarity(text: str, other: str) -> float:
    """Of the two sets themselves: a signature only estimates."""
    (a, _), (b, _) = shingles([text]), shingles([other])
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


class _Checksums(dict[str, int]):
    """The CRC-32 of each word, computed once: most words of a text are words of many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 2**18:
            self.clear()
        self[word] = checksum = zlib.crc32(word.encode())
        return checksum


_checksums = _Checksums()


def shingles(texts: Iterable[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The set of all runs of three words in each text, each run as a number: [k] of all texts, one after the other;
    and how many runs each text has. [n]
    """
    listed = [words(text) for text in texts]
    sizes = np.array([len(text) for text in listed], np.int64)  # [n]
    checksums = np.fromiter((_checksums[word] for text in listed for word in text), np.uint64, sizes.sum())
    texts_of = np.repeat(np.arange(len(listed), dtype=np.uint64), sizes)  # as long as checksums
    runs = checksums[:-2] * _RUN[0] + checksums[1:-1] * _RUN[1] + checksums[2:] * _RUN[2]  # wraps modulo 2^64
    inside = texts_of[:-2] == texts_of[2:]
    keys = (texts_of[:-2] << np.uint64(32) | runs >> np.uint64(32))[inside]  # the text above, its run below
    keys.sort()
    keys = keys[np.append(True, keys[1:] != keys[:-1])] if keys.size else keys
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(listed))
    return keys.astype(np.uint32), counts


def minhash(runs: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """A signature of each set: the share of equal columns in two estimates their Jaccard similarity (Broder 1997).

    runs, counts: of `shingles`; every count is at least 1. [n, BANDS * BAND]
    """
    starts = np.cumsum(counts) - counts
    mixed = runs ^ runs >> np.uint32(16)  # MurmurHash3's finaliser, then x -> a x + b modulo 2^32 with odd a
    mixed = mixed * np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed = mixed * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    signatures = np.zeros((len(counts), BANDS * BAND), np.uint32)
    if len(counts):
        for column, (a, b) in enumerate(zip(*_PERMUTATIONS, strict=True)):
            signatures[:, column] = np.minimum.reduceat(mixed * a + b, starts)
    return signatures


def candidates(signatures: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Pairs (row, earlier row) that look alike, one at most for each row. signatures: [n, BANDS * BAND].

    In every band a row is compared with the first row of its bucket alone, so that the work grows with the rows
    and not with their pairs, even where a template makes all rows alike.
    """
    best = np.zeros(len(signatures), np.float32)
    partner = np.zeros(len(signatures), np.int64)
    for band in range(BANDS):
        columns = np.ascontiguousarray(signatures[:, band * BAND : (band + 1) * BAND])
        keys = columns.view(np.dtype((np.void, columns.itemsize * BAND))).ravel()
        _, first, bucket = np.unique(keys, return_index=True, return_inverse=True)
        rows = np.flatnonzero(first[bucket] != np.arange(len(keys)))
        others = first[bucket][rows]
        alike = (signatures[rows] == signatures[others]).mean(axis=1, dtype=np.float32)
        better = alike > best[rows]
        best[rows[better]], partner[rows[better]] = alike[better], others[better]
    near = np.flatnonzero(best >= NEAR - 0.15)  # the estimate's standard deviation at 0.8 is 0.05
    return [(int(row), int(partner[row])) for row in near]
