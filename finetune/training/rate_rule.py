"""A rule for the starting learning rate, through measured best rates: from width, batch and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from backends.model_folder import ModelFolder
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import trainable_numbers

FALLING = ((256, 3e-3), (576, 5e-4), (4096, 1e-4))  # hidden size, best rate where it falls to zero
AVERAGED = ((256, 1e-3), (576, 5e-4), (4096, 1e-4))  # hidden size, best rate where it stays and steps are averaged
HEAD = 4.0  # times the averaged rate, where a head learned alone before
HIGHEST = 1e-2  # no model was seen to learn at a higher one
SHORT = 150  # steps: runs of fewer have a higher rate
UNKNOWN = 2e-4  # where the model's config does not say how wide it is
# Times LoRA's, where every weight trains: the best rates of LoRA were ten times those of the whole model, whatever the
# task, the model and the rank (Schulman et al., "LoRA Without Regret", 2025).
FULL = 0.1
LANES = (0.25, 0.5, 1.0, 2.0)  # times the start: the rates that race


@dataclass(frozen=True)
class Start:
    """A learning rate, and what it was taken from."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    rate: float
    hidden: int | None  # the model's width
    trainable: int  # numbers that train
    steps: int  # predicted
    batch: int
    headed: bool = False  # a head learns alone before

    @property
    def lanes(self) -> list[float]:
        """The rates that race, in two digits."""
        return [float(f"{self.rate * lane:.1e}") for lane in LANES]

    @property
    def why(self) -> str:
        known = f"hidden size {self.hidden:,}" if self.hidden else "a hidden size that the config does not say"
        about = f"{self.trainable:,} trainable numbers, {self.steps:,} steps of {self.batch} rows"
        return f"{self.rate:.1e} by rule, for {known}, {about}{', a head that learned alone' if self.headed else ''}"

    @property
    def no_race(self) -> str:
        """Why none is run, where that is so."""
        if self.headed:
            return "no race: beside a head that learned alone the lowest rates win every short one"
        return "the run is too short for a race"


def starting_rate(recipe: Recipe, folder: ModelFolder, rows: int) -> Start:
    """rows: trained on. Raises BackendError where the model has no such layers."""
    plan, full = make_plan(recipe, rows), recipe.method == "full"
    hidden = folder.text_config.get("hidden_size")
    known = hidden if isinstance(hidden, int) and hidden > 0 else None
    rate = UNKNOWN if known is None else fitted(known, recipe.train.batch_size, plan.predicted, plan.open_end)
    rate = min(rate * HEAD, HIGHEST) if plan.open_end and recipe.head_alone else rate
    rate *= FULL if full else 1.0
    trainable = trainable_numbers(recipe, folder) if folder.weights else 0  # a toy has none
    return Start(float(f"{rate:.1e}"), known, trainable, plan.predicted, recipe.train.batch_size, recipe.head_alone)


def fitted(hidden: int, batch: int, steps: int, averaged: bool = False) -> float:
    """The rate of the rule. hidden: the model's width. batch: rows of a step. steps: of the run, as predicted.

    averaged: the rate stays, and steps are averaged (`epochs: auto`); else it falls to zero.

    Straight lines, in logarithms, through three best rates of LoRA on all linear layers, with AdamW, alpha twice the
    rank and steps of 16 rows:

    | hidden size | model                  | falling                              | averaged                |
    | 256         | the embedded base      | 3e-3 (nine sets of 50 to 5,000 rows) | 1e-3 (seven small sets) |
    | 576         | SmolLM2, 0.135 B       | 5e-4                                 |                         |
    | 4,096       | models of 8 B          | 1e-4                                 |                         |

    The figures are in tests/benchmarks/README.md. With an average SmolLM2 did well at the rule's rate in two short
    runs; wider models were not measured. The square root for the batch is Adam's (Malladi et al., 2022). Rank and
    trainable numbers are not in it: with one alpha and a scale of alpha / rank the best rate hardly depends on them
    (Schulman et al., "LoRA Without Regret", 2025). Adam moves a weight by about the rate in each step, so a run of few
    steps needs a higher rate to come as far: as many times higher with an average, the root of it where the rate falls.
    """
    short = min(max(SHORT / steps, 1.0), 8.0 if averaged else 16.0)
    known, power = (AVERAGED, 1.0) if averaged else (FALLING, 0.5)
    (narrow, high), (wide, low) = known[:2] if hidden < known[1][0] else known[1:]
    rate = high * (hidden / narrow) ** (math.log(low / high) / math.log(wide / narrow))
    return min(float(rate * short**power * (batch / 16) ** 0.5), HIGHEST)
