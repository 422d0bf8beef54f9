"""Joins the processes of a run into a group. Imports no framework until asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from backends import registry, table
from backends.follower import Share, follow
from backends.interface import BackendError, Session, Wanted
from backends.process_rank import Launcher, ProcessRank
from backends.shared_session import SharedSession, generate_all, score_all, side_by_side
from backends.team import Group, Team
from backends.timeouts import PATIENCE, watch

__all__ = [
    "PATIENCE",
    "Group",
    "ProcessRank",
    "Share",
    "SharedSession",
    "engines",
    "find_place",
    "generate_all",
    "join",
    "launcher",
    "lead",
    "led",
    "score_all",
    "side_by_side",
    "watch",
]  # fmt: skip


def find_place(environment: Mapping[str, str] = os.environ) -> ProcessRank | None:
    """Of this process, as a launcher says it; None: it is alone. Raises BackendError for what no launcher says."""
    for name, row in table.BACKENDS.items():
        if not row.launcher:
            continue
        try:
            found = launcher(name).find_place(environment)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise BackendError(f"what {launcher(name).NAME} tells this process cannot be read ({error})") from None
        if found is not None and found.size > 1:
            return replace(found, backend=name)
    return None


def launcher(name: str) -> Launcher:
    """Raises BackendError where the backend computes in one process alone."""
    module = table.row(name).launcher
    if not module:
        raise BackendError(f"{name} computes in one process; leave --devices away")
    return cast(Launcher, import_module(module))


def engines(name: str) -> list[str]:
    """What joins processes here, in words, where the backend is usable; empty: nothing."""
    module = table.row(name).group
    return list(import_module(module).engines()) if module else []


def join(here: ProcessRank, wanted: Wanted) -> Group:
    """Every process of the run calls it. Raises BackendError, Lost."""
    return cast(Group, import_module(table.row(here.backend).group).join(here, wanted))


def lead(session: Session, group: Group, local: int) -> SharedSession:
    """In the first process. local: the processes of the run on this machine."""
    return SharedSession(session, Team(group, session.get_state), registry.device_kind(session.device), local)


def led(
    session: Session, group: Group, stop: Callable[[], int], share_of: Callable[[Mapping[str, Any]], Share]
) -> None:
    """In any other process: until the first one says that it is the end. Raises Lost.

    stop: the signal that asked this process to stop, or 0. share_of: this process's rows of a step.
    """
    follow(session, Team(group, session.get_state, stop), share_of)
