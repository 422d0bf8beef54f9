"""Random validation split: a pure function of the rows and the seed."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from finetune.data.problems import BadSource
from finetune.data.rows import Record

Group = list[int]  # rows that ask the same thing


def set_apart(
    records: Sequence[Record], fraction: float, seed: int, stratified: bool = False
) -> tuple[list[Record], list[Record]]:
    """(train, valid), both in the file's order and neither empty; rows of the same key stay on one side.

    So runs were parted that say nothing of how; new ones are parted by `finetune.data.grouped_split`.
    """
    chosen = choose(records, keys(records), fraction, seed, stratified)
    return (
        [record for row, record in enumerate(records) if row not in chosen],
        [records[row] for row in sorted(chosen)],
    )


def choose(
    records: Sequence[Record], together: Sequence[Hashable], fraction: float, seed: int, stratified: bool = False
) -> set[int]:
    """The rows for validation, at least one and not all.

    together: of each row, what it shares with those that stay on its side. stratified: by the record's answer, the
    label. The order in which groups are taken is a hash of seed and key, so it depends neither on the rows' order nor
    on a library's generator. Raises BadSource where there are not two groups of rows to part.
    """
    strata = _strata(records, together, seed, stratified)
    quotas = _quotas(strata, fraction)
    chosen = {row for name, groups in strata.items() for row in _take(groups, quotas[name])}
    if chosen:
        return chosen
    movable = [groups for groups in strata.values() if len(groups) > 1]
    if not movable:
        raise BadSource(
            records[0].location if records else "data.train",
            "too few different rows to set some apart for validation; add rows, or name a file with data.valid",
        )
    smallest = min((group for groups in movable for group in groups), key=lambda group: len(group))
    return set(smallest)


def keys(records: Sequence[Record]) -> list[str]:
    """What rows that ask the very same share."""
    return [record.key.strip() for record in records]


def _strata(
    records: Sequence[Record], together: Sequence[Hashable], seed: int, stratified: bool
) -> dict[str, list[Group]]:
    groups: dict[Hashable, Group] = defaultdict(list)
    for row, shared in enumerate(together):
        groups[shared].append(row)
    named = keys(records)

    def rank(group: Group) -> bytes:
        return hashlib.sha256(f"{seed}\n{min(named[row] for row in group)}".encode()).digest()

    strata: dict[str, list[Group]] = defaultdict(list)
    for group in sorted(groups.values(), key=rank):
        # Rows that ask the same may disagree on the label; the smallest label then names the stratum.
        label = min(records[row].answer or "" for row in group) if stratified else ""
        strata[label].append(group)
    return dict(sorted(strata.items()))


def _quotas(strata: Mapping[str, Sequence[Group]], fraction: float) -> dict[str, int]:
    """Rows to take from each stratum: the largest remainders get what rounding down leaves over."""
    exact = {name: fraction * sum(map(len, groups)) for name, groups in strata.items()}
    quotas = {name: math.floor(share) for name, share in exact.items()}
    left = max(1, round(sum(exact.values()))) - sum(quotas.values())
    movable = [name for name, groups in strata.items() if len(groups) > 1]
    for name in sorted(movable, key=lambda name: quotas[name] - exact[name])[: max(left, 0)]:
        quotas[name] += 1
    return quotas


def _take(groups: Sequence[Group], quota: int) -> Group:
    """Rows of the first groups that fit the quota; one group at least stays."""
    taken: Group = []
    left = len(groups)
    for group in groups:
        if left > 1 and len(taken) + len(group) <= quota:
            taken += group
            left -= 1
    return taken
