"""`doctor`: which backends work on this machine, and why not."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from backends import registry
from finetune.errors import EnvironmentProblem


def doctor() -> None:
    """One row a backend; exits 7 when none of the real ones works."""
    table = Table(title="Backends on this machine")
    for heading in ("backend", "works", "what it would use, or why not"):
        table.add_column(heading, overflow="fold")
    for name in registry.NAMES:
        reason = registry.probe(name)
        facts = reason if reason is not None else ", ".join(f"{k} {v}" for k, v in registry.describe(name).items())
        table.add_row(name, "no" if reason else "yes", facts)
    Console().print(table)
    if all(registry.probe(name) for name in registry.NAMES if name != "reference"):
        raise EnvironmentProblem("no backend works here; the reasons stand in the table")
