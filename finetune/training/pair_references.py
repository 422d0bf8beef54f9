"""Reference log-probabilities of preference pairs: computed once, stored in the run's folder."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np

from backends.interface import Session
from finetune.data.rows import Prepared, Split
from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible
from finetune.evaluation.evaluate import base_weights
from finetune.evaluation.pairs import referred, scored_pairs
from finetune.events import Progress
from finetune.training.job import Job

REFERENCES = "references: loss"  # of the progress, and of the forecast
_REMEDY = "delete it, and the pairs are scored again"

Kept = dict[str, list[tuple[float, float]]]  # by split


def with_references(job: Job, session: Session, run: RunFolder | None = None) -> Generator[Progress, None, Prepared]:
    """The pairs of every split with their references, where the loss needs any; other rows as they are.

    run: where they are kept; a resumed run takes those. Raises Incompatible for a file that no run writes,
    MemoryExhausted.
    """
    prepared, asked = job.prepared, job.recipe.preferences
    if asked is None or not asked.refers:
        return prepared
    kept = read_json(run.references, Kept, _REMEDY) if run else None
    if kept is None:
        kept = {}
        with base_weights(session):
            for split in prepared.splits:
                found = yield from scored_pairs(session, split.examples, job.recipe.train.tokens_at_once, REFERENCES)
                kept[split.name] = [(float(better), float(worse)) for better, worse in found]
        if run:
            run.write_json(run.references.name, kept)
    if {split.name: len(split.examples) for split in prepared.splits} != {name: len(one) for name, one in kept.items()}:
        raise Incompatible(f"{run and run.references}: of other rows than this run's; {_REMEDY}")
    test = prepared.test and _referred(prepared.test, kept)
    return replace(prepared, train=_referred(prepared.train, kept), valid=_referred(prepared.valid, kept), test=test)


def _referred(split: Split, by_split: Kept) -> Split:
    return replace(split, examples=referred(split.examples, np.array(by_split.get(split.name, [])).reshape(-1, 2)))
