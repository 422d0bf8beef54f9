"""Label and group counts, words that predict a label, and equal texts with different labels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.check.record_texts import everything
from finetune.data.label_names import look_alikes
from finetune.data.row_words import content, words
from finetune.data.rows import Record, Split
from finetune.errors import RecipeError
from finetune.recipe.schema import Groups

PRIOR = 0.1  # the weight of the prior, as a share of all words
TELLING = 3.0  # standard errors of the log-odds from which a word is shown
FEWEST = 5  # rows that hold the word
WORDS_SHOWN = 5  # of each label
ALONE = 0.98  # share of a word's rows under one label, from which the word alone gives it away
OFTEN = 0.1  # and of that label's rows that must hold it


@dataclass(frozen=True)
class Telling:
    """A word that goes with one label."""

    word: str
    z: float  # log-odds against the other labels, in standard errors
    rows: int  # of this label that hold it
    elsewhere: int  # rows of other labels that hold it
    alone: bool  # it gives the label away by itself


@dataclass(frozen=True)
class Group:
    rows: int
    share: float
    labels: Mapping[str, int]


@dataclass
class Balance:
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> label -> rows
    words: dict[str, list[Telling]] = field(default_factory=dict)  # label -> the most telling
    contradictions: list[list[tuple[str, str]]] = field(default_factory=list)  # (location, label) of one text
    groups: dict[str, Group] = field(default_factory=dict)  # of all splits together
    alike: list[list[str]] = field(default_factory=list)  # labels that a person may take for one


def weigh(splits: Sequence[Split], labels: Sequence[str], groups: Groups | None) -> Balance:
    """splits: train first. labels: none where rows have open answers; then only the groups are counted."""
    balance = Balance(groups=count_groups(splits, groups) if groups else {})
    if not labels:
        return balance
    for split in splits:
        counts = Counter(record.answer or "" for record in split.records)
        balance.labels[split.name] = {label: counts[label] for label in labels}
    balance.alike = look_alikes(labels)
    balance.words = telling_words(splits[0].records, labels)
    balance.contradictions = contradictions([record for split in splits for record in split.records])
    return balance


def telling_words(records: Sequence[Record], labels: Sequence[str]) -> dict[str, list[Telling]]:
    """The words whose log-odds under a label stand out: Monroe, Colaresi and Quinn (2008), equations 16 and 22.

    A word counts once a row; the prior is the words' frequency in all rows.
    """
    counts: dict[str, Counter[str]] = {label: Counter() for label in labels}
    rows = Counter(record.answer or "" for record in records)
    for record in records:
        counts[record.answer or ""].update(set(words(content(record, labelled=True))))
    whole: Counter[str] = sum(counts.values(), Counter())
    total = whole.total()
    common = {word for word, count in whole.items() if count >= FEWEST}
    telling = {}
    for label, inside in counts.items():
        size = inside.total()
        scored = ((_z(inside[word], size, whole[word], total), word) for word in inside if word in common)
        best = sorted((pair for pair in scored if pair[0] >= TELLING), key=lambda pair: (-pair[0], pair[1]))
        telling[label] = [_telling(word, z, inside, whole, rows[label]) for z, word in best[:WORDS_SHOWN]]
    return telling


def _z(inside: int, size: int, whole: int, total: int) -> float:
    prior, outside = PRIOR * whole, whole - inside
    here = math.log((inside + prior) / (size + PRIOR * total - inside - prior))
    rest = math.log((outside + prior) / (total - size + PRIOR * total - outside - prior))
    return (here - rest) / math.sqrt(1 / (inside + prior) + 1 / (outside + prior))


def _telling(word: str, z: float, inside: Counter[str], whole: Counter[str], rows: int) -> Telling:
    count = inside[word]
    alone = count >= ALONE * whole[word] and count >= OFTEN * rows
    return Telling(word=word, z=round(z, 1), rows=count, elsewhere=whole[word] - count, alone=alone)


def contradictions(records: Sequence[Record]) -> list[list[tuple[str, str]]]:
    """Rows of the same text under different labels."""
    seen: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        seen[" ".join(content(record, labelled=True).casefold().split())].append(record)
    differing = (same for same in seen.values() if len({record.answer for record in same}) > 1)
    return [[(record.location, record.answer or "") for record in same] for same in differing]


def count_groups(splits: Sequence[Split], groups: Groups) -> dict[str, Group]:
    """How each group stands in the data. Raises RecipeError for a column that no row has."""
    records = [record for split in splits for record in split.records]
    if isinstance(groups, str) and not any(groups in record.values for record in records):
        raise RecipeError(f"data.groups: no row has a column {groups}; name a column, or give each group its words")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for name in groups_of(record, groups):
            counts[name][record.answer or ""] += 1
    if not isinstance(groups, str):
        counts.update({name: Counter() for name in groups if name not in counts})
    return {name: Group(one.total(), one.total() / len(records), dict(one)) for name, one in sorted(counts.items())}


def groups_of(record: Record, groups: Groups) -> Iterator[str]:
    """The groups that a row is of: one of a column, any number of those with words."""
    if isinstance(groups, str):
        yield record.values.get(groups, "").strip() or "(none)"
        return
    said = set(words(everything(record)))
    yield from (name for name, listed in groups.items() if any(word.casefold() in said for word in listed))
