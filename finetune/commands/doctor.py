"""`doctor`: which backends work on this machine, and why not."""

from __future__ import annotations

from rich.table import Table

from backends import registry
from backends.interface import Wanted
from backends.process_group import engines, launcher
from finetune.console import Console, lines
from finetune.errors import EnvironmentProblem


def described(name: str, device: Wanted = "auto") -> list[str]:
    """A usable backend's device, abilities and library versions, on one line; on others, which cards it does not use,
    and why.
    """
    facts = registry.describe(name, device)
    abilities = {"4-bit": facts["4bit"], "activation recomputation": facts["checkpointing"]}
    words = [f"{ability}: {'yes' if able else 'no'}" for ability, able in abilities.items()]
    versions = ", ".join(f"{library} {version}" for library, version in facts["versions"].items())
    unused = registry.unused_accelerator(name, device)
    return ["; ".join([facts["device"], *words, versions]), *(line for line in (facts["others"], unused) if line)]


def run() -> None:
    """One row per backend; exits 7 when none that `backend: auto` considers works."""
    table = Table(title="Backends on this machine")
    for heading in ("backend", "works", "what it would use, or why not"):
        table.add_column(heading, overflow="fold")
    reasons = {name: registry.probe(name) for name in registry.NAMES}
    for name, reason in reasons.items():
        table.add_row(name, "no" if reason else "yes", lines(*([reason] if reason else _with_shortcuts(name))))
    Console().print(table)
    if all(reasons[name] for name in registry.automatic()):
        raise EnvironmentProblem("no backend works here; the table says why")


def _with_shortcuts(name: str) -> list[str]:
    """And the shortcuts that it has. Whether they work for a model is tested when that model is opened."""
    shortcuts, joined = ", ".join(registry.shortcuts(name)), ", ".join(engines(name))
    found = described(name)
    if joined:
        found.append(f"several processes (--devices, {launcher(name).NAME}): {joined}")
    if not shortcuts:
        return found
    return [*found, f"shortcuts, where a model allows them (a run's own: environment.json): {shortcuts}"]
