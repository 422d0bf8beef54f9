"""Schedule: steps, evaluations, checkpoints and learning rate, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from finetune.recipe.schema import Recipe

DEFAULT_EPOCHS = 3
MOST_EPOCHS = 6  # that `epochs: auto` makes
USUAL_EPOCHS = 5  # that it made in most runs
FALLS = 0.02  # of the lowest validation loss so far: an epoch that lowers it by less is not worth another like it


@dataclass(frozen=True)
class Plan:
    """The run in optimiser steps. With `epochs: auto` it is the longest that the run may be, until `known_end`."""

    steps: int
    steps_per_epoch: int
    evaluate_every: int
    checkpoint_every: int
    warmup: int
    falls_after: int  # the steps done before the rate begins to fall
    falls_from: float = 1.0  # times the peak: the rate then
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
    warmup = round(train.warmup * steps)
    return Plan(
        steps=per_epoch * MOST_EPOCHS if open_end else steps,
        steps_per_epoch=per_epoch,
        evaluate_every=recipe.evaluate.every or per_epoch,
        checkpoint_every=train.checkpoint_every or per_epoch,
        warmup=warmup,
        falls_after=warmup,
        open_end=open_end,
    )


def known_end(recipe: Recipe, plan: Plan, validations: Iterable[tuple[int, float, float | None]]) -> Plan:
    """The plan once validations, in order, say where it ends; before they do, and without an open end, the same plan.

    validations: as (step, loss, accuracy); of labelled rows only those after which something was learned.

    The rate falls as in the longest run while each epoch lowers the loss by FALLS or has the highest accuracy so far,
    where there is one. After the first that does neither, it falls from where it is to zero over one epoch more. A
    constant rate ends with that one.
    """
    if not plan.open_end:
        return plan
    lowest, highest, falls = math.inf, 0.0, 0 if recipe.train.schedule == "constant" else plan.steps_per_epoch
    for step, loss, accuracy in validations:
        if not plan.ends_epoch(step):
            continue
        if step + falls >= plan.steps:
            break
        if step and loss > lowest * (1.0 - FALLS) and (accuracy or 0.0) <= highest:
            return replace(plan, steps=step + falls, falls_after=step, falls_from=_rate(recipe, plan, step, 1.0))
        lowest, highest = min(lowest, loss), max(highest, accuracy or 0.0)
    return plan


def learning_rate(recipe: Recipe, plan: Plan, step: int) -> float:
    """The rate of the step after `step` done ones: linear warmup, then constant, linear or cosine to zero."""
    peak = recipe.train.learning_rate
    if isinstance(peak, str):
        raise ValueError("the race of rates comes before the first step")
    return _rate(recipe, plan, step, peak)


def _rate(recipe: Recipe, plan: Plan, step: int, peak: float) -> float:
    if step < plan.warmup:
        return peak * (step + 1) / plan.warmup
    progress = max(step - plan.falls_after, 0) / max(plan.steps - plan.falls_after, 1)  # [0, 1)
    if recipe.train.schedule == "linear":
        return peak * plan.falls_from * (1.0 - progress)
    if recipe.train.schedule == "cosine":
        return peak * plan.falls_from * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * plan.falls_from
