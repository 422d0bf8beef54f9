"""`next`: rows of a pool that are worth labelling next, in a file with all their columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from finetune.check.next_rows import Choice, new_rows, next_rows
from finetune.console import Console, lines
from finetune.data.problems import listed
from finetune.data.read import read
from finetune.data.rows import Example
from finetune.disk.atomic import write_file
from finetune.disk.run_folder import RunFolder, open_existing
from finetune.disk.run_list import overview
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import DataError, Incompatible, RecipeError
from finetune.recipe.names import local
from finetune.report.live_screen import with_progress
from finetune.report.prompts import distinct
from finetune.report.report import load_evaluation
from finetune.report.row_files import as_text, check_output
from finetune.text import from_here, shorten
from finetune.training.job import making_ready
from finetune.training.reopen import ready_to_answer

SHOWN, TEXT_SHOWN = 10, 100  # rows in the table, and characters of each
TABLES = (".csv", ".tsv")


def run(pool: str, rows: int, path: Path | None, output: Path | None, force: bool, backend: str | None) -> None:
    """Writes `output`, whole or not at all. path: the run; the newest finished one in runs/ if not given."""
    opened, recipe = open_existing(path or _newest(Path("runs")))
    tuned = load_evaluation(opened.evaluation("tuned"))
    if tuned is None:
        raise Incompatible(f"{opened.path}: this run is not finished; resume it first")
    if recipe.task == "text":
        raise Incompatible(f"{opened.path}: trained on plain text, of which no row has a label or an answer to write")
    source_file = local(pool, Path.cwd())
    ending = ".csv" if Path(pool).suffix.lower() in TABLES else ".jsonl"
    output = output or opened.path / f"next{ending}"
    check_output(output, force, source_file)
    source = read(str(source_file or pool), Path.cwd(), "test", recipe.data.encoding)
    trained = with_progress(making_ready(recipe, backend, opened.path)).prepared
    job, asked = with_progress(ready_to_answer(recipe, backend, opened, source))
    check_run_base(opened, job.folder)
    examples = job.prepared.held_out.examples
    new = len(new_rows(examples, trained))
    if not new:
        raise DataError(f"{pool}: every row stands among the run's own rows; there is none to label")
    session = job.open(read_trained(opened))
    made = with_progress(next_rows(session, job.recipe, job.prepared, trained, tuned.accuracy, rows))
    chosen = [asked[one.number] for one in made]
    write_file(output, as_text(output, [row.fields for row in chosen]))
    if left_out := [*job.prepared.held_out.left_out, *job.prepared.held_out.too_long]:
        print(*listed(left_out), f"{len(left_out)} rows left out (data.on_error: skip)", sep="\n", file=sys.stderr)
    _show(made, examples, opened, new, output)


def _newest(folder: Path) -> Path:
    """Raises RecipeError where the folder holds no finished run."""
    finished = [line.path for line in (overview(folder) if folder.is_dir() else []) if line.state == "finished"]
    if not finished:
        raise RecipeError(f"no finished run in {folder}/; name one with --run, or train one on the first rows")
    return finished[0]


def _show(made: Sequence[Choice], examples: Sequence[Example], opened: RunFolder, new: int, output: Path) -> None:
    console = Console()
    few = f"all {len(made):,}" if len(made) == new else f"{len(made):,} of {new:,}"
    console.print(lines(f"Label next: {few} new rows, in {from_here(str(output))}", style="bold"))
    labelled = any(one.answer for one in made)
    table = Table(*["row", "model's answer"][: 1 + labelled], "sure", "text", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1 + labelled].justify = "right"
    texts = distinct([examples[one.number].prompt for one in made])
    for one, text in zip(made[:SHOWN], texts, strict=False):
        cells = [from_here(examples[one.number].location), *([shorten(one.answer, 40)] if labelled else [])]
        table.add_row(*map(lines, cells), f"{one.sure:.2f}", lines(shorten(text, TEXT_SHOWN)))
    console.print(table)
    console.print(
        lines(f"By the model of {from_here(str(opened.path))}. Label them, add them to the training rows, train.")
    )
