"""`doctor`: which backends work on this machine, and why not."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backends import registry
from finetune.errors import EnvironmentProblem


def described(name: str) -> str:
    """A usable backend's device, abilities and versions on one line."""
    facts = dict(registry.describe(name))
    versions = ", ".join(f"{library} {version}" for library, version in facts.pop("versions", {}).items())
    return "; ".join([*(f"{key} {value}" for key, value in facts.items()), versions])


def run() -> None:
    """One row a backend; exits 7 when none of the real ones works."""
    table = Table(title="Backends on this machine")
    for heading in ("backend", "works", "what it would use, or why not"):
        table.add_column(heading, overflow="fold")
    for name in registry.NAMES:
        reason = registry.probe(name)
        table.add_row(name, "no" if reason else "yes", Text(reason or described(name)))
    Console().print(table)
    if all(registry.probe(name) for name in registry.NAMES if name != "reference"):
        raise EnvironmentProblem("no backend works here; the reasons stand in the table")
