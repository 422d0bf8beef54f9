"""Splits a step's rows among processes by tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from backends.interface import Batch, Session
from backends.process_group import Share, SharedSession
from finetune.data.collate import micro_batches, step_indices
from finetune.data.rows import Example


@dataclass(frozen=True)
class Cut:
    """All that a step's rows and their micro-batches follow from, beside the training rows themselves."""

    step: int  # done before
    batch_size: int
    seed: int
    micro_tokens: int
    prefixes: bool  # whether rows share them

    def examples(self, rows: Sequence[Example]) -> list[Example]:
        return [rows[i] for i in step_indices(len(rows), self.batch_size, self.seed, self.step)]

    def micro(self, examples: Sequence[Example], rank: int, size: int) -> list[Batch]:
        return micro_batches(examples, self.micro_tokens, self.prefixes, rank, size)

    def share(self, examples: Sequence[Example], rank: int, size: int) -> Share:
        """Of the step's examples, for one process."""
        micro = self.micro(examples, rank, size)
        weights = [example.weights[1:] for example in examples]
        return Share(
            micro,
            weight=float(sum(np.sum(one, dtype=np.float64) for one in weights)),
            tokens=sum(int(np.count_nonzero(one)) for one in weights),
            mine=sum(int(np.count_nonzero(batch.weights)) for batch in micro),
        )


Batches = Callable[[Sequence[Example], int, bool], list[Batch]]  # of `Objective`


def own_micro(session: Session, batches: Batches, cut: Cut, examples: Sequence[Example], last: bool) -> list[Batch]:
    """This process's micro-batches of a step; where it is alone all, as its objective forms them.

    examples: of the step. last: whether other work comes after it.
    """
    if not isinstance(session, SharedSession):
        return batches(examples, cut.micro_tokens, cut.prefixes)
    share = cut.share(examples, 0, session.processes)
    session.next_step(asdict(cut), share.weight, share.tokens, share.mine, last)
    return share.micro


def every_micro(session: Session, batches: Batches, cut: Cut, examples: Sequence[Example]) -> list[Batch]:
    """The micro-batches of all processes."""
    if not isinstance(session, SharedSession):
        return batches(examples, cut.micro_tokens, cut.prefixes)
    size = session.processes
    return [batch for rank in range(size) for batch in cut.micro(examples, rank, size)]


def share_of(rows: Sequence[Example], cut: Mapping[str, Any], rank: int, size: int) -> Share:
    """As the first process says a step."""
    known = Cut(**{key: value for key, value in cut.items() if key != "do"})
    return known.share(known.examples(rows), rank, size)
