"""What every kind of export is made from, and what it must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backends.interface import Session
from finetune.disk.adapter import Adapter
from finetune.export.measure import Exported
from finetune.export.prompt import Travelling
from finetune.export.verify import Check
from finetune.training.job import Job


@dataclass(frozen=True)
class Making:
    """A run's model, loaded, and its prompt."""

    job: Job
    session: Session  # with the adapter in it
    adapter: Adapter
    travels: Travelling
    always: Mapping[str, str | None]  # what every training row had beside its question


class Target(Protocol):
    """One kind of export."""

    @property
    def name(self) -> str:
        """Of its folder, where the user names none."""

    @property
    def kind(self) -> str:
        """The type of its numbers: how near to the run's model it must be."""

    @property
    def finer(self) -> str:
        """What to use where it loses too much; empty where nothing loses less."""

    def write(self, to: Path, making: Making) -> list[Check]:
        """Everything into the folder `to`, which is empty; how the files were checked. Raises FinetuneError."""

    def open(self, path: Path, job: Job) -> Exported:
        """The export as a program loads it. Raises FinetuneError."""

    def tidy(self, path: Path) -> None:
        """Takes away what only the verification needed."""

    def commands(self, path: Path) -> list[str]:
        """What serves it."""
