"""This process's rank and the number of ranks, and the interface of a launcher. Imports no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ProcessRank:
    """Of one process in a run of several."""

    rank: int  # from 0
    size: int  # processes, at least 2
    local_rank: int  # on this machine
    local_size: int
    backend: str = ""  # whose launcher started it


class Launcher(Protocol):
    """What a backend's launcher module exports. Importing it loads no framework."""

    NAME: str  # as a person would type it
    RANK: str  # the variable in which it says a process's number

    def find_place(self, environment: Mapping[str, str]) -> ProcessRank | None:
        """What the launcher says in the environment; None: nothing. Raises OSError, ValueError for nonsense."""

    def command(self, processes: int, arguments: Sequence[str]) -> list[str]:
        """Starts `python -m finetune ARGUMENTS` so many times on this machine. Raises OSError where no port is free."""

    def variables(self) -> Mapping[str, str]:
        """What must stand in the environment of processes that all are on this machine."""

    def cards(self) -> int:
        """The GPUs of this machine that processes can have one each of; 0: there is none."""
