"""Naive Bayes on the words of prompts, as a baseline without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.data.rows import Example

MOST_READ = 10_000  # characters of a row
_CELLS = 2**23  # words times labels in the table


class WordCounts:
    """How often each word stands under each label, add-one smoothed; a word counts once a row.

    Words of every row (the template's) tell nothing. Labels that no row has are never guessed, and not in `labels`.
    """

    def __init__(self, rows: Sequence[Example], labels: Sequence[str]) -> None:
        answers = {str(row.answer) for row in rows}
        self.labels = [label for label in labels if label in answers]
        number = {label: i for i, label in enumerate(self.labels)}
        self.truth = np.array([number[str(row.answer)] for row in rows], np.int64)  # [n]
        said = [_words(row.prompt) for row in rows]
        frequent = Counter(word for row in said for word in row).most_common()
        most = _CELLS // max(len(self.labels), 1)
        self._columns = {
            word: i for i, word in enumerate([word for word, count in frequent if count < len(rows)][:most])
        }
        self._rows = [self._known(row) for row in said]
        k, words = len(self.labels), len(self._columns)
        cells = [column * k + t for row, t in zip(self._rows, self.truth.tolist(), strict=True) for column in row]
        self._counts = np.bincount(np.array(cells, np.int64), minlength=words * k).reshape(words, k)
        self._totals = self._counts.sum(axis=0)  # [k]
        self._each = np.bincount(self.truth, minlength=k)  # rows of each label. [k]

    def _known(self, words: set[str]) -> list[int]:
        return sorted(self._columns[word] for word in words if word in self._columns)

    def logprobs(self, asked: Sequence[Example]) -> NDArray[np.float64]:
        """log p(words, label) of other rows. [asked, k]"""
        table = np.log((self._counts + 1) / (self._totals + len(self._columns) + 1))  # [words, k]
        prior = np.log((self._each + 1) / (len(self.truth) + len(self.labels)))
        return np.array([prior + table[self._known(_words(row.prompt))].sum(axis=0) for row in asked])

    def without_itself(self) -> NDArray[np.float64]:
        """log p(words, label) of each row by all rows but that one: what the others say of it. [n, k]"""
        k, words = len(self.labels), len(self._columns)
        made = np.zeros((len(self.truth), k))
        for i, (columns, t) in enumerate(zip(self._rows, self.truth.tolist(), strict=True)):
            own = np.arange(k) == t  # its own count, taken away
            counts = self._counts[columns] - own  # [its words, k]
            totals = self._totals - own * len(columns) + words + 1
            prior = (self._each - own + 1) / (len(self.truth) - 1 + k)
            made[i] = np.log(prior) + np.log((counts + 1) / totals).sum(axis=0)
        return made


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text[:MOST_READ].casefold()))
