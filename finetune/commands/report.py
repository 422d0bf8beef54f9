"""`report`: the page of a finished run written anew, or one without any text of its data."""

from __future__ import annotations

from pathlib import Path

from finetune.console import Console
from finetune.disk.atomic import write_file
from finetune.report.finished import read_finished
from finetune.report.page.run_page import run_page
from finetune.report.page.without_rows import without_rows
from finetune.report.summary import PAGE

BARE_PAGE = "report-without-rows.html"


def run(path: Path, output: Path | None, rows: bool) -> None:
    """Writes `output`; without it report.html in the run's folder, or report-without-rows.html. Raises Incompatible."""
    finished = read_finished(path)
    page = run_page(finished) if rows else run_page(without_rows(finished), rows=False)
    file = output or path / (PAGE if rows else BARE_PAGE)
    write_file(file, page)
    Console().print(f"the page: {file}", soft_wrap=True)
