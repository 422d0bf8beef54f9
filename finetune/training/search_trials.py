"""Trials of a search: other rates, ranks, epochs and layers, and how far each trains."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from math import ceil
from typing import Any, ClassVar

from backends.interface import Modules
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.training.rate_rule import Start

RATES = (1.0, 2.0, 0.5, 4.0)  # times the rate that is known to be near, the likeliest first
KEPT = 3  # one trial in so many goes on
SHARES = (1 / 9, 1 / 3)  # of the recipe's own steps: where trials are compared before the last ones end
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
    """The recipe as it is, and others in the order in which they are worth a try: the same for the same recipe.

    start: the rate that a rule gives, taken where the recipe names none. modules: linear layers in the model's blocks.
    """
    asked = recipe.train.learning_rate
    near = start.rate if isinstance(asked, str) else asked
    rates: list[float | None] = [float(f"{near * factor:.1e}") for factor in RATES]
    if not isinstance(asked, str):
        rates[0] = None
    ranks, epochs, targets = _ranks(recipe), _epochs(recipe), _targets(recipe, modules)
    rest = list(product(ranks, epochs, targets))[1:]
    random.Random(recipe.seed).shuffle(rest)
    others = [[Trial(rate)] + [Trial(rate, *one) for one in rest] for rate in rates]
    for shift, one in enumerate(others):  # so that the first ones differ in more than the rate
        one[1:] = one[1 + shift :] + one[1 : 1 + shift]
    ordered = [trial for several in zip_longest(*others) for trial in several if trial is not None]
    return [Trial(), *(trial for trial in dict.fromkeys(ordered) if trial != Trial())]


def _ranks(recipe: Recipe) -> list[int | None]:
    rank, fixed = recipe.lora.rank, recipe.lora.start_from or recipe.method == "full"
    return [None] if fixed else [None, 2 * rank, *([rank // 2] if rank > 1 else [])]


def _epochs(recipe: Recipe) -> list[int | None]:
    asked = recipe.train.epochs
    if recipe.train.steps is not None:
        return [None]
    return [None, 2] if asked == "auto" else [None, 2 * (asked or 3)]


def _targets(recipe: Recipe, modules: Modules) -> list[tuple[str, ...] | None]:
    there = {name.rpartition(".")[2] for name in modules}
    adapts_all = recipe.method == "lora" and recipe.lora.targets == "all"
    few = adapts_all and not recipe.lora.start_from and set(ATTENTION) < there
    return [None, tuple(ATTENTION)] if few else [None]


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar, 2016), by thirds. The recipe as it is goes all the way beside it."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    others: int  # trials beside the recipe as it is
    stops: tuple[int, int]  # optimiser steps after which the recipe itself would be compared

    @property
    def left(self) -> tuple[int, int]:
        """How many others go on after each stop."""
        return ceil(self.others / KEPT), ceil(self.others / KEPT**2)


def stops_of(recipe: Recipe, rows: int) -> tuple[int, int]:
    """Where a trial with this recipe is compared: at a share of its own steps, so that all rates have fallen as far."""
    whole = make_plan(recipe, rows).predicted
    first, second = (max(ceil(share * whole), 1) for share in SHARES)
    return first, max(second, first)


def halving(
    recipe_stops: tuple[int, int], stops: Sequence[tuple[int, int]], longest: Sequence[int], steps: float
) -> Halving:
    """The largest that fits in so many optimiser steps beside the recipe as it is.

    recipe_stops: its stops. stops and longest: of each other, where it is compared and its steps.
    """
    made = Halving(0, recipe_stops)
    for others in range(1, len(longest) + 1):
        wider = Halving(others, recipe_stops)
        if _steps(wider, stops[:others], longest[:others]) > steps:
            break
        made = wider
    return made


def _steps(halving: Halving, stops: Sequence[tuple[int, int]], longest: Sequence[int]) -> int:
    """Of all others together, where those with the most steps go on."""
    middle, last = halving.left
    between = sorted((second - first for first, second in stops), reverse=True)
    rest = sorted((max(end - second, 0) for (_, second), end in zip(stops, longest, strict=True)), reverse=True)
    return sum(first for first, _ in stops) + sum(between[:middle]) + sum(rest[:last])
