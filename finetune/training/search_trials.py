"""Trials of a search: other rates, ranks, epochs and layers, and how far each trains."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from backends.interface import Modules
from finetune.recipe.schedule import MOST_EPOCHS, make_plan
from finetune.recipe.schema import Recipe
from finetune.training.rate_rule import HIGHEST, Start

RATES = (2.0, 0.5, 4.0)  # times the recipe's rate, or the one that a rule gives, the likeliest first
KEPT = 3  # one trial in so many goes on
SHARE = 1 / 3  # of a trial's own steps, after which it is compared: after less, losses say little of what they come to
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Trial:
    """What it changes in the recipe; None: as the recipe says."""

    learning_rate: float | None = None
    rank: int | None = None
    epochs: int | None = None
    targets: tuple[str, ...] | None = None

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe of this trial; the adapter's weight alpha / rank stays."""
        train = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        made = recipe.with_train(**{key: value for key, value in train.items() if value is not None})
        lora: dict[str, Any] = {}
        if self.rank is not None:
            lora = {"rank": self.rank, "alpha": recipe.lora.alpha * self.rank / recipe.lora.rank}
        if self.targets is not None:
            lora["targets"] = list(self.targets)
        return made.model_copy(update={"lora": made.lora.model_copy(update=lora)})

    @property
    def settings(self) -> str:
        """For people, as the command line takes it."""
        said = {
            "train.learning_rate": None if self.learning_rate is None else f"{self.learning_rate:.1e}",
            "train.epochs": self.epochs,
            "lora.rank": self.rank,
            "lora.targets": None if self.targets is None else f"[{', '.join(self.targets)}]",
        }
        return " ".join(f"{key}={value}" for key, value in said.items() if value is not None) or "the recipe as it is"


def trials_of(recipe: Recipe, start: Start, modules: Modules) -> list[Trial]:
    """The recipe as it is, others with one change, and then those with several: the same for the same recipe.

    start: the rate that a rule gives, taken where the recipe names none. modules: linear layers in the model's blocks.
    """
    rates, ranks, epochs, targets = _rates(recipe, start), _ranks(recipe), _epochs(recipe), _targets(recipe, modules)
    likeliest, unlikelier = rates[:2], rates[2:]
    one = [Trial(rate) for rate in likeliest] + [Trial(epochs=count) for count in epochs]
    one += [Trial(rank=rank) for rank in ranks] + [Trial(targets=chosen) for chosen in targets]
    one += [Trial(rate) for rate in unlikelier]
    several = [Trial(*each) for each in product(*([None, *values] for values in (rates, ranks, epochs, targets)))]
    random.Random(recipe.seed).shuffle(several)
    return [*dict.fromkeys([Trial(), *one, *several])]


def _rates(recipe: Recipe, start: Start) -> list[float]:
    asked = recipe.train.learning_rate
    near, highest = (start.rate, HIGHEST) if isinstance(asked, str) else (asked, math.inf)
    rates = [min(float(f"{near * factor:.1e}"), highest) for factor in RATES]
    return [rate for rate in dict.fromkeys(rates) if rate != near]


def _ranks(recipe: Recipe) -> list[int]:
    rank, fixed = recipe.lora.rank, recipe.lora.start_from or recipe.method == "full"
    return [] if fixed else [2 * rank, *([rank // 2] if rank > 1 else [])]


def _epochs(recipe: Recipe) -> list[int]:
    asked = recipe.train.epochs
    if recipe.train.steps is not None:
        return []
    return [MOST_EPOCHS // 2] if asked == "auto" else [2 * (asked or 3)]


def _targets(recipe: Recipe, modules: Modules) -> list[tuple[str, ...]]:
    there = {name.rpartition(".")[2] for name in modules}
    adapts_all = recipe.method == "lora" and recipe.lora.targets == "all"
    few = adapts_all and not recipe.lora.start_from and set(ATTENTION) < there
    return [tuple(ATTENTION)] if few else []


def compared_after(recipe: Recipe, rows: int) -> int:
    """The step after which a trial with this recipe is compared: a share of its own steps, so that falling rates have
    fallen as far.
    """
    return max(math.ceil(SHARE * make_plan(recipe, rows).predicted), 1)


def going_on(others: int) -> int:
    """How many of them train to their end."""
    return math.ceil(others / KEPT)


def most_that_fit(stops: Sequence[int], longest: Sequence[int], steps: float) -> int:
    """How many trials, from the first one on, fit in so many optimiser steps.

    stops and longest: of each, where it is compared and its steps. The longest ones may be those that go on.
    """
    most = 0
    for count in range(1, len(longest) + 1):
        rest = sorted((end - stop for stop, end in zip(stops[:count], longest[:count], strict=True)), reverse=True)
        if sum(stops[:count]) + sum(rest[: going_on(count)]) > steps:
            break
        most = count
    return most
