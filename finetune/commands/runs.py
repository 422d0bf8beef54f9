"""`runs`: the runs in a folder, the newest first."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.console import Console
from finetune.disk.run_list import overview
from finetune.errors import Incompatible
from finetune.text import shorten


def run(folder: Path) -> None:
    """Prints a line for each. Raises Incompatible where there is no such folder."""
    if not folder.is_dir():
        raise Incompatible(
            f"{folder}: no such folder; `finetune train` makes runs in the recipe's `output`, or in runs"
        )
    lines = overview(folder)
    console = Console()
    if not lines:
        console.print(f"{folder}: no runs")
        return
    table = Table("run", "state", "began", "model", "data", "base -> tuned", "verdict", box=box.SIMPLE_HEAD)
    for line in lines:
        state, style = shorten(line.state, 100), "red" if line.state.startswith("damaged") else ""
        cells = (line.name, line.model, line.data, line.figure, line.verdict)
        name, model, data, figure, verdict = (Text(shorten(cell, 60)) for cell in cells)
        table.add_row(name, Text(state, style), f"{line.began:%Y-%m-%d %H:%M}", model, data, figure, verdict)
    console.print(table)
