"""Validation rows set apart from the training rows: a pure function of the rows and the seed."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from finetune.data.problems import BadSource
from finetune.data.rows import Record

Group = list[int]  # rows that ask the same thing


def set_apart(
    records: Sequence[Record], fraction: float, seed: int, stratified: bool = False
) -> tuple[list[Record], list[Record]]:
    """(train, valid), both in the file's order and neither empty.

    Rows of the same key stay on one side. stratified: by the record's answer, the label. The order in which
    groups are taken is a hash of seed and key, so it depends neither on the rows' order nor on a library's
    generator. Raises BadSource where there are not two groups of rows to part.
    """
    strata = _strata(records, seed, stratified)
    quotas = _quotas(strata, fraction)
    chosen = {row for name, groups in strata.items() for row in _take(groups, quotas[name])}
    if not chosen:
        movable = [groups for groups in strata.values() if len(groups) > 1]
        if not movable:
            raise BadSource(
                records[0].location if records else "data.train",
                "too few different rows to set some apart for validation; add rows, or name a file with data.valid",
            )
        smallest = min((group for groups in movable for group in groups), key=lambda group: len(group))
        chosen = set(smallest)
    train = [record for row, record in enumerate(records) if row not in chosen]
    return train, [records[row] for row in sorted(chosen)]


def _strata(records: Sequence[Record], seed: int, stratified: bool) -> dict[str, list[Group]]:
    groups: dict[str, Group] = defaultdict(list)
    for row, record in enumerate(records):
        groups[record.key.strip()].append(row)

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{key}".encode()).digest()

    strata: dict[str, list[Group]] = defaultdict(list)
    for key in sorted(groups, key=rank):
        # Rows that ask the same may disagree on the label; the smallest label then names the stratum.
        label = min(records[row].answer or "" for row in groups[key]) if stratified else ""
        strata[label].append(groups[key])
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
