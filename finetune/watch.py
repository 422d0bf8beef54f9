"""Divergence while the loss is still a number: it is said, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable

from finetune.events import Event, StepDone, Validated

IN_A_ROW = 3  # steps: one of a few strange rows is not divergence


class Watch:
    """Notices, once, a loss above ln(vocabulary): what a model has for which all tokens are equally likely."""

    def __init__(self, vocabulary: int | None, warmup: int) -> None:
        """warmup: steps in which the rate still rises, and nothing is said."""
        self._guessing = math.log(vocabulary) if vocabulary else math.inf
        self._warmup = warmup
        self._above = 0  # the last so many steps
        self._said = False

    def look(self, event: Event) -> str | None:
        if self._said or event.step <= self._warmup or not isinstance(event, StepDone | Validated):
            return None
        high = event.loss > self._guessing
        if isinstance(event, StepDone):
            self._above = self._above + 1 if high else 0
            high = self._above >= IN_A_ROW
        if not high:
            return None
        self._said = True
        what = "training" if isinstance(event, StepDone) else "validation"
        return (
            f"Diverging? After step {event.step} the {what} loss is {event.loss:.2f}, and guessing has "
            f"{self._guessing:.2f}, the logarithm of the vocabulary. Lower train.learning_rate, or look at the rows."
        )


def divergence(events: Iterable[Event], vocabulary: int | None, warmup: int) -> str | None:
    """What was noticed in the events of a whole run."""
    watch = Watch(vocabulary, warmup)
    return next((said for event in events if (said := watch.look(event))), None)
