"""Schedule: steps, evaluations, checkpoints and learning rate, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from finetune.recipe.schema import Recipe

DEFAULT_EPOCHS = 3
MOST_EPOCHS = 6  # that `epochs: auto` makes
USUAL_EPOCHS = 5  # that it made in most runs
FALLS = 0.02  # of the lowest validation loss so far: an epoch that lowers it by less is the last of `epochs: auto`


@dataclass(frozen=True)
class Plan:
    """The run in optimiser steps. With `epochs: auto` it is the longest that the run may be."""

    steps: int
    steps_per_epoch: int
    evaluate_every: int
    checkpoint_every: int
    warmup: int
    open_end: bool = False

    @property
    def predicted(self) -> int:
        """The steps that the run is taken to have where that is not known yet."""
        return USUAL_EPOCHS * self.steps_per_epoch if self.open_end else self.steps

    def evaluates_after(self, step: int) -> bool:
        return step == self.steps or step % self.evaluate_every == 0 or (self.open_end and self.ends_epoch(step))

    def checkpoints_after(self, step: int) -> bool:
        return step == self.steps or step % self.checkpoint_every == 0

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0


def make_plan(recipe: Recipe, rows: int) -> Plan:
    """`rows` are the examples trained on; the short last step of an epoch counts as a step."""
    train = recipe.train
    per_epoch = math.ceil(rows / train.batch_size)
    open_end = train.epochs == "auto"
    planned = USUAL_EPOCHS if train.epochs == "auto" else train.epochs or DEFAULT_EPOCHS
    steps = train.steps if train.steps is not None else per_epoch * planned
    return Plan(
        steps=per_epoch * MOST_EPOCHS if open_end else steps,
        steps_per_epoch=per_epoch,
        evaluate_every=recipe.evaluate.every or per_epoch,
        checkpoint_every=train.checkpoint_every or per_epoch,
        warmup=round(train.warmup * steps),
        open_end=open_end,
    )


def hardly_falls(plan: Plan, losses: Iterable[tuple[int, float]]) -> bool:
    """Whether the last epoch lowered the loss by less than FALLS.

    losses: of validations, in order, as (step, loss); those within an epoch do not count.
    """
    *before, last = [loss for step, loss in losses if plan.ends_epoch(step)] or [0.0]
    return bool(before) and last > min(before) * (1.0 - FALLS)


def learning_rate(recipe: Recipe, plan: Plan, step: int) -> float:
    """The rate of the step after `step` done ones: linear warmup, then constant, linear or cosine to zero."""
    peak, shape = recipe.train.learning_rate, recipe.train.shape
    if isinstance(peak, str):
        raise ValueError("the race of rates comes before the first step")
    if step < plan.warmup:
        return peak * (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(plan.steps - plan.warmup, 1)  # [0, 1)
    if shape == "linear":
        return peak * (1.0 - progress)
    if shape == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
