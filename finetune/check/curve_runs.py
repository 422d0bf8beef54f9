"""Training runs of a learning curve: the same recipe on a quarter and on half of its training rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator
from operator import itemgetter

import numpy as np

from backends.interface import Session
from finetune.check.retrain import without_rows
from finetune.data.rows import Prepared
from finetune.errors import DataError
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.learning_curve import SHARES
from finetune.events import Event
from finetune.training.job import Job

FEWEST = 40  # training rows: of fewer a quarter teaches nothing


def parts_of(prepared: Prepared, seed: int) -> list[list[str]]:
    """The locations of the rows in each of SHARES, the larger with all rows of the smaller. Raises DataError.

    Rows with labels are drawn so that each label has its share in every part.
    """
    labels = {one.location: (one.answer or "") if prepared.labels else "" for one in prepared.train.examples}
    if len(labels) < FEWEST:
        raise DataError(f"{len(labels)} training rows: too few for a learning curve, which needs {FEWEST}")
    locations, count, seen = list(labels), Counter(labels.values()), Counter[str]()
    placed: list[tuple[float, str]] = []  # how much of its label's rows stands before it, and the row
    for i in np.random.default_rng(seed).permutation(len(locations)):
        label = labels[locations[i]]
        placed.append(((seen[label] + 0.5) / count[label], locations[i]))
        seen[label] += 1
    drawn = [location for _, location in sorted(placed, key=itemgetter(0))]
    return [drawn[: math.ceil(share * len(drawn))] for share in SHARES]


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
