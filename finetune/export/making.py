"""What every kind of export is made from, and what it must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.interface import Session
from finetune.disk.adapter import Adapter
from finetune.export.measure import Exported
from finetune.export.verify import Check
from finetune.training.job import Job


@dataclass(frozen=True)
class Making:
    """A run's model, loaded, and its prompt as a chat template."""

    job: Job
    session: Session  # with the adapter in it
    adapter: Adapter
    template: str
    notes: Sequence[str]  # what the template cannot carry, or carries in a way of its own
    always: Mapping[str, str | None]  # what every training row had beside its question


@dataclass(frozen=True)
class Target(ABC):
    """One kind of export."""

    name: str  # of its folder, where the user names none
    kind: str  # the type of its numbers: how near to the run's model it must be
    finer: str = ""  # of what is quantised: what to use where it loses too much

    @abstractmethod
    def write(self, to: Path, making: Making) -> list[Check]:
        """Everything into the folder `to`, which is empty; how the files were checked. Raises FinetuneError."""

    @abstractmethod
    def open(self, path: Path, job: Job) -> Exported:
        """The export as a program loads it. Raises FinetuneError."""

    @abstractmethod
    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        """What serves it. adapter: the run's folder of that name."""
