"""The most important findings: a verdict, a table of counts, and one line for the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from finetune.check.survey import Findings
from finetune.console import lines
from finetune.data.unrendered import THINKING, TOOLS
from finetune.report.tables import figures_table

_SAID = {"enough": "green", "thin": "yellow", "too little": "red"}  # level -> style


def verdict(findings: Findings, values: Mapping[str, Any]) -> list[RenderableType]:
    """values: of `as_json`."""
    rows = len(findings.prepared.train.examples)
    found = {what: count for what, count in _counts(values).items() if count}
    first = lines(f"ready to train on {rows:,} row{'s' * (rows != 1)}", style="bold green")
    if findings.faults:
        first = lines(f"{findings.faults:,} to fix before training", style="bold red")
    enough = values["enough"]
    table = figures_table("rows", "count")
    for what, count in found.items():
        table.add_row(what, f"{count:,}")
    data = lines(f"data: {enough['level']}, {enough['reasons'][0]}", style=_SAID.get(enough["level"], ""))
    counts: list[RenderableType] = [Text(), table] if found else []
    return [first, data, *counts, Text()]


def headline(values: Mapping[str, Any]) -> str:
    """One line of what `as_json` gave, for the end of a run."""
    rows = ", ".join(f"{count:,} {what}" for what, count in _counts(values).items() if count)
    enough = values["enough"]
    rows = f"rows: {rows}" if rows else "no repeated, leaked or faulty rows"
    return f"{rows}; {enough['reasons'][0]} ({enough['level']})"


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    """What is wrong with rows -> how many; 0 where nothing is."""
    pairs, specials = values["duplicates"], values["special_tokens"]
    return {
        "repeated": len(pairs["exact"]) + len(pairs["near"]),
        "leaked from one split to another": len(pairs["leaks"]),
        "with personal data": sum(kind["rows"] for kind in values["personal"].values()),
        "with special tokens written out": 0 if specials["meant"] else len(specials["places"]),
        "whose thoughts no text holds": _left_out(values, THINKING),
        "whose tools no text holds": _left_out(values, TOOLS),
        "faulty": values["faults"],
    }


def _left_out(values: Mapping[str, Any], field: str) -> int:
    """Rows of all splits. A check.json of an earlier version has none."""
    return sum(split.get("left_out_fields", {}).get(field, 0) for split in values["splits"].values())
