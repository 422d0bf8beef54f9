"""A rule for the starting learning rate, through measured best rates: from width, batch and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from backends.model_folder import ModelFolder
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import trainable_numbers

KNOWN = ((256, 3e-3), (576, 5e-4), (4096, 1e-4))  # hidden size, best rate
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

    @property
    def lanes(self) -> list[float]:
        """The rates that race, in two digits."""
        return [float(f"{self.rate * lane:.1e}") for lane in LANES]

    @property
    def why(self) -> str:
        known = f"hidden size {self.hidden:,}" if self.hidden else "a hidden size that the config does not say"
        about = f"{self.trainable:,} trainable numbers, {self.steps:,} steps of {self.batch} rows"
        return f"{self.rate:.1e} by rule, for {known}, {about}"


def starting_rate(recipe: Recipe, folder: ModelFolder, rows: int) -> Start:
    """rows: trained on. Raises BackendError where the model has no such layers."""
    plan, full = make_plan(recipe, rows), recipe.method == "full"
    hidden = folder.text_config.get("hidden_size")
    known = hidden if isinstance(hidden, int) and hidden > 0 else None
    rate = UNKNOWN if known is None else fitted(known, recipe.train.batch_size, plan.predicted)
    rate *= FULL if full else 1.0
    trainable = trainable_numbers(recipe, folder) if folder.weights else 0  # a toy has none
    return Start(float(f"{rate:.1e}"), known, trainable, plan.predicted, recipe.train.batch_size)


def fitted(hidden: int, batch: int, steps: int) -> float:
    """The rate of the rule. hidden: the model's width. batch: rows of a step. steps: of the run, as predicted.

    Straight lines, in logarithms, through three best rates of LoRA on all linear layers, with AdamW, alpha twice the
    rank and steps of 16 rows:

    | hidden size | model                  | best rate |
    | 256         | the embedded base      | 3e-3 (four sets of 2,000 to 5,000 rows, and five smaller ones on average) |
    | 576         | SmolLM2, 0.135 B       | 5e-4 |
    | 4,096       | models of 8 B          | 1e-4 |

    The figures of the embedded base are in tests/benchmarks/README.md. One power of the width, by least squares, has
    2.1e-3 and 8.3e-4 at the first two. The square root for the batch is Adam's (Malladi et al., 2022). Rank and
    trainable numbers are not in it: with one alpha and a scale of alpha / rank the best rate hardly depends on them
    (Schulman et al., "LoRA Without Regret", 2025). Adam moves a weight by about the rate in each step, so a run of few
    steps needs a higher rate to come as far.
    """
    short = min(max(SHORT / steps, 1.0), 16.0)
    (narrow, high), (wide, low) = KNOWN[:2] if hidden < KNOWN[1][0] else KNOWN[1:]
    rate = high * (hidden / narrow) ** (math.log(low / high) / math.log(wide / narrow))
    return min(float(rate * (short * batch / 16) ** 0.5), HIGHEST)
