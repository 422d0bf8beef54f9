"""State of the training loop, and whether labels are learned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from finetune.disk.run_files import check_values
from finetune.evaluation.baselines import clearly_above
from finetune.events import Validated

REMEDY = "remove that checkpoint's folder to resume from the one before it"


@dataclass
class LoopState:
    """What the loop itself remembers from step to step; JSON-able, and part of every checkpoint."""

    micro_tokens: int
    best_step: int = 0
    best_loss: float = math.inf
    without_better: int = 0  # validations since the best one
    loss_sum: float = 0.0  # since the last validation, weighted by tokens
    loss_tokens: int = 0
    stopped_early: bool = False
    validations: list[Validated] = field(default_factory=list)

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    @classmethod
    def from_json(cls, values: Any, where: str = "loop.json") -> LoopState:
        """What `to_json` gave. Raises Incompatible, naming `where`, for anything else."""
        every = isinstance(values, dict) and values.keys() == {one.name for one in fields(cls)}
        none = every and values["best_loss"] is None  # JSON has no infinity
        state = check_values(values | {"best_loss": 0.0} if none else values if every else None, cls, where, REMEDY)
        return replace(state, best_loss=math.inf) if none else state

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    def history(self) -> list[Validated]:
        return [*self.validations]


def has_learned(validated: Validated, majority: float | None, rows: int) -> bool:
    """Whether it answers clearly better than always with the most frequent label.

    majority: the share of that label in the validation `rows`. Where there are no labels nothing can be told: True.
    """
    if majority is None or validated.accuracy is None:
        return True
    return clearly_above(validated.accuracy, majority, rows)
