"""Objectives of a step: answers to imitate (or classes, through a head), or pairs of answers.

An objective forms the micro-batches and the loss of a step. What a row supervises is settled where rows become
examples (`finetune.data.examples`), and what is measured by the task (`finetune.evaluation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from backends.interface import Batch, NonFinite, Session, StepResult
from finetune.data.collate import micro_batches
from finetune.data.pair_batches import pair_batches
from finetune.data.rows import Example
from finetune.evaluation.pair_losses import PairLoss, pair_loss
from finetune.evaluation.pairs import of_batch
from finetune.recipe.schema import Recipe


class Objective(Protocol):
    together: int  # rows of a batch that are never parted

    def batches(self, examples: Sequence[Example], micro_tokens: int, share: bool) -> list[Batch]:
        """A step's examples within micro_tokens of padded tokens each."""

    def step(self, session: Session, examples: Sequence[Example], micro: list[Batch], rate: float) -> StepResult:
        """One update from those batches. Raises as `Session.step`."""


class Imitation:
    """The mean of -log p over all supervised tokens."""

    together = 1

    def batches(self, examples: Sequence[Example], micro_tokens: int, share: bool) -> list[Batch]:
        return micro_batches(examples, micro_tokens, share)

    def step(self, session: Session, examples: Sequence[Example], micro: list[Batch], rate: float) -> StepResult:
        return session.step(micro, rate)


@dataclass(frozen=True)
class Preference:
    """A loss of both answers' log-probabilities, as `finetune.evaluation.pair_losses` has it.

    The pairs are scored first; then the gradient is that of a weighted sum of -log p, whose weights (below 0 for the
    worse answers) are the loss's derivatives. So no pair needs to be in memory with another.
    """

    loss: PairLoss
    together = 2

    def batches(self, examples: Sequence[Example], micro_tokens: int, share: bool) -> list[Batch]:
        return [batch for _, batch in pair_batches(examples, micro_tokens, share)]

    def step(self, session: Session, examples: Sequence[Example], micro: list[Batch], rate: float) -> StepResult:
        found = np.zeros((len(examples), 2))
        for batch in micro:
            found[_pairs(batch)] = of_batch(session, batch)
        loss = float(self.loss.losses(examples, found).mean())
        if not np.isfinite(loss):
            raise NonFinite(f"preference loss {loss}")
        pull = (-self.loss.slopes(examples, found) / len(examples)).astype(np.float32)  # [n, 2]
        weighted = [replace(batch, weights=batch.weights * pull[_pairs(batch)].reshape(-1, 1)) for batch in micro]
        return replace(session.step(weighted, rate, total=1.0), loss=loss)


def _pairs(batch: Batch) -> list[int]:
    """The numbers of a batch's pairs in their step."""
    return [row // 2 for row in batch.rows[::2]]


def objective_of(recipe: Recipe) -> Objective:
    loss = pair_loss(recipe)
    return Imitation() if loss is None else Preference(loss)
