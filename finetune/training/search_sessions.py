"""The loaded model of a search's trials: one at a time, shared by trials whose adapters have the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends import registry
from backends.interface import Session, TrainState
from finetune.training.search_trials import Trial


class TrialSessions:
    def __init__(self, trials: Sequence[Trial], opened: Callable[[int], Session]) -> None:
        """opened: the session of a trial, by its number."""
        self._trials, self._opened = trials, opened
        self._now: tuple[Trial, Session, TrainState] | None = None

    def shape(self, trial: int) -> Trial:
        """What its adapter's shapes follow from."""
        return Trial(rank=self._trials[trial].rank, targets=self._trials[trial].targets)

    def of(self, trial: int) -> Session:
        """At its beginning: as it was opened. What frozen blocks made of rows is taken along."""
        shape = self.shape(trial)
        if self._now is None or self._now[0] != shape:
            kept = self._now[1].kept_states if self._now else None
            self.close()  # two models at once may not fit
            session = self._opened(trial)
            session.take_kept_states(kept)
            self._now = (shape, session, session.get_state())
        _, session, start = self._now
        session.set_state(start)
        return session

    def close(self) -> None:
        self._now = None
        registry.free_dropped_models()
