"""`epochs: auto`: an average of what trains, in the place of a rate that falls to zero at an end that is not known.

Steps at a constant rate go around a minimum; their average is near it, at every moment of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from backends.interface import FloatArray, Session
from finetune.recipe.schedule import Plan

SAMPLES = {"lora": 16, "full": 2}  # of an epoch, at most: more say the same, and a whole model is a large sample
POWER = 5  # the n-th sample weighs about n ** POWER: the average is of the last part of the run, however long that is


class Average:
    """The average with polynomial decay (Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization",
    2013, section 4). Of a run whose end is known it stays empty.
    """

    def __init__(self, plan: Plan, method: str) -> None:
        self._every = max(plan.steps_per_epoch // SAMPLES[method], 1) if plan.open_end else None
        self.tensors: dict[str, FloatArray] = {}
        self.power = POWER

    def restore(self, tensors: Mapping[str, FloatArray]) -> None:
        self.tensors = {name: tensor.copy() for name, tensor in tensors.items()}

    def follow(self, step: int, session: Session) -> None:
        """After `step` done ones: takes a sample where one is due."""
        if self._every is None or step % self._every:
            return
        sample = session.trained()
        if not self.tensors:
            self.tensors = sample
            return
        share = np.float32((self.power + 1) / (step // self._every + self.power))
        for name, tensor in sample.items():
            self.tensors[name] += share * (tensor - self.tensors[name])

    def result(self, session: Session) -> dict[str, FloatArray]:
        """What `within` measures: a copy."""
        return {name: tensor.copy() for name, tensor in self.tensors.items()} or session.trained()

    @contextmanager
    def within(self, session: Session) -> Iterator[None]:
        """Inside, the session has the average, where there is one; afterwards what it had."""
        if not self.tensors:
            yield
            return
        now = session.trained()
        session.set_trained(self.tensors)
        try:
            yield
        finally:
            session.set_trained(now)
