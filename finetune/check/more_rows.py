"""A run's learning curve: the same recipe on a quarter and on half of its training rows."""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np

from backends.interface import Session
from finetune.check.proof import without_rows
from finetune.data.rows import Prepared
from finetune.errors import DataError
from finetune.evaluation.curve import SHARES
from finetune.evaluation.evaluate import Evaluation
from finetune.events import Event
from finetune.training.job import Job

FEWEST = 40  # training rows: of fewer a quarter teaches nothing


def parts_of(prepared: Prepared, seed: int) -> list[list[str]]:
    """The locations of the rows in each of SHARES, the larger with all rows of the smaller. Raises DataError."""
    locations = list(dict.fromkeys(example.location for example in prepared.train.examples))
    if len(locations) < FEWEST:
        raise DataError(f"{len(locations)} training rows: too few for a learning curve, which needs {FEWEST}")
    drawn = np.random.default_rng(seed).permutation(len(locations))
    return [[locations[i] for i in drawn[: math.ceil(share * len(locations))]] for share in SHARES]


def curve(job: Job, session: Session, whole: Evaluation) -> Generator[Event, None, list[Evaluation]]:
    """The held-out rows under the models of all SHARES. Raises DataError, Diverged, MemoryExhausted.

    session: of the base; its adapter is another afterwards. whole: the run's own, of all rows.
    """
    parts, untrained = parts_of(job.prepared, job.recipe.seed), session.get_state()
    made = []
    for rows in parts[:-1]:
        session.set_state(untrained)
        rest = set(parts[-1]) - set(rows)
        one = yield from without_rows(job, session, None, rest, math.inf, f"model of {len(rows):,} rows")
        assert one is not None  # there is no deadline
        made.append(one)
    return [*made, whole]
