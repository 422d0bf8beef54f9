"""When things happen, and the learning rate: pure functions of the recipe and the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.recipe.schema import Recipe

DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class Plan:
    """The run in optimiser steps."""

    steps: int
    steps_per_epoch: int
    evaluate_every: int
    checkpoint_every: int
    warmup: int

    def evaluates_after(self, step: int) -> bool:
        return step == self.steps or step % self.evaluate_every == 0

    def checkpoints_after(self, step: int) -> bool:
        return step == self.steps or step % self.checkpoint_every == 0


def make_plan(recipe: Recipe, rows: int) -> Plan:
    """`rows` are the examples trained on; the short last step of an epoch counts as a step."""
    train = recipe.train
    per_epoch = math.ceil(rows / train.batch_size)
    steps = train.steps if train.steps is not None else per_epoch * (train.epochs or DEFAULT_EPOCHS)
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        evaluate_every=recipe.evaluate.every or per_epoch,
        checkpoint_every=train.checkpoint_every or per_epoch,
        warmup=round(train.warmup * steps),
    )


def learning_rate(recipe: Recipe, plan: Plan, step: int) -> float:
    """The rate of the step after `step` done ones: linear warmup, then constant, linear or cosine to zero."""
    peak = recipe.train.learning_rate
    if step < plan.warmup:
        return peak * (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(plan.steps - plan.warmup, 1)  # [0, 1)
    if recipe.train.schedule == "linear":
        return peak * (1.0 - progress)
    if recipe.train.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
