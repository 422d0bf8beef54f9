"""`data.limit`: a seeded sample of each split, for a first try."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from finetune.data.rows import Prepared, Split

_KEY = "data.limit"


def limited(split: Split, limit: int | None, seed: int) -> Split:
    """At most `limit` of its records, in the file's order, with a note of how many there were.

    Which are drawn is a hash of the seed and their numbers, so that no library's generator decides it.
    """
    count = len(split.records)
    if limit is None or count <= limit:
        return split

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{seed}\nlimit\n{number}".encode()).digest()

    drawn = sorted(sorted(range(count), key=rank)[:limit])
    note = f"{_KEY}: {limit:,} of {count:,} rows drawn (seed {seed})"
    records = [split.records[number] for number in drawn]
    return replace(split, rows=split.rows - count + limit, records=records, notes=(*split.notes, note))


def limit_notes(prepared: Prepared) -> tuple[str, ...]:
    """What it left of each split, for the report."""
    splits = (prepared.train, prepared.held_out)
    return tuple(f"{split.name}: {note}" for split in splits for note in split.notes if note.startswith(_KEY))
