"""`report`: the page of a finished run written anew, or one without any text of its data."""

from __future__ import annotations

from pathlib import Path

from finetune.console import Console
from finetune.report.summary import write_page


def run(path: Path, output: Path | None, rows: bool) -> None:
    """Writes `output`; without it report.html in the run's folder, or report-without-rows.html. Raises Incompatible."""
    Console().print(f"the page: {write_page(path, output, rows)}", soft_wrap=True)
