"""`suspects`: the training rows of a run that hurt, in a table and a file; and the proof, where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from backends.interface import Session, TrainState
from finetune.check.retrain import predicted_seconds, verdict, without_rows
from finetune.check.suspects import Suspect, find_suspects, rows_judged
from finetune.console import Console, lines
from finetune.disk.atomic import write_file
from finetune.disk.identity import check_rows
from finetune.disk.metrics import read
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import Incompatible, RecipeError
from finetune.evaluation.evaluate import Evaluation
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.report import load_evaluation
from finetune.report.row_files import as_text
from finetune.text import duration, from_here, shorten
from finetune.training.job import Job, making_ready
from finetune.training.memory_settings import settle_memory

SHOWN = 20  # rows in the table
TEXT_SHOWN, TEXT_WRITTEN = 100, 500  # characters of a row's text, in the table and in the file
SPARE = 1.5  # of the run's own time: without so much a proof would hardly end


def run(opened: RunFolder, recipe: Recipe, minutes: float | None, backend: str | None) -> None:
    """Writes suspects.csv into the run's folder, whole or not at all. minutes: that the proof may take."""
    if recipe.preferences:
        raise RecipeError("suspects: it judges rows with one answer; of pairs `finetune check` names contradictions")
    adapter = read_trained(opened)
    tuned = load_evaluation(opened.evaluation("tuned"))
    if tuned is None:
        raise Incompatible(f"{opened.path}: this run is not finished; resume it first")
    if minutes is not None:
        _refuse_too_short(opened, minutes)
    job = with_progress(making_ready(recipe, backend, opened.path))
    check_rows(opened.path, job.prepared, "Put the rows back as they were, or train a new run on the rows as they are")
    check_run_base(opened, job.folder)
    if minutes is not None:
        job = with_progress(settle_memory(job, opened.recomputed()))
    session = job.open()
    untrained = session.get_state()
    session.set_state(TrainState(0, adapter.tensors, {}))
    micro_tokens = recipe.train.tokens_at_once
    suspects, _ = with_progress(find_suspects(session, job.prepared, micro_tokens, tuned.accuracy))
    file = opened.path / "suspects.csv"
    write_file(file, _file(file, suspects))
    _show(suspects, len(rows_judged(job.prepared)), file)
    if minutes is not None:
        session.set_state(untrained)
        _prove(opened, job, session, suspects, tuned, minutes)


def _refuse_too_short(opened: RunFolder, minutes: float) -> None:
    """Raises RecipeError where the run's own training took longer than the proof may take."""
    seconds = predicted_seconds(read(opened.metrics))
    if seconds > 60 * minutes:
        enough = max(round(SPARE * seconds / 60 + 0.5), 1)
        raise RecipeError(
            f"--prove {minutes:g}: the run trained for {duration(seconds)}, and without the suspects it takes about as "
            f"long; allow more minutes: --prove {enough}"
        )


def _prove(
    opened: RunFolder, job: Job, session: Session, suspects: Sequence[Suspect], tuned: Evaluation, minutes: float
) -> None:
    trained = {example.location for example in job.prepared.train.examples}
    removed = trained & {suspect.location for suspect in suspects if suspect.doubt > 0}
    if not removed:
        print("Proof: no row speaks against its answer, so nothing is trained without one.")
        return
    without = with_progress(without_rows(job, session, opened, removed, 60 * minutes))
    if without is None:
        print(f"Proof: not ended within {minutes:g} minutes, so it says nothing; allow more with --prove")
        return
    print(verdict(len(trained), len(removed), tuned, without))


def _file(file: Path, suspects: Sequence[Suspect]) -> str:
    """A table that a spreadsheet opens too; only a heading where there are no suspects."""
    rows = [
        {
            "row": suspect.location,
            "answer": shorten(suspect.answer, TEXT_WRITTEN),
            "likelier": suspect.suggested,
            "doubt": f"{suspect.doubt:.3f}",
            "why": suspect.why,
            "text": shorten(suspect.text, TEXT_WRITTEN),
        }
        for suspect in suspects
    ]
    return as_text(file, rows) if rows else "row,answer,likelier,doubt,why,text\n"


def _show(suspects: Sequence[Suspect], rows: int, file: Path) -> None:
    console = Console()
    if not suspects:
        console.print(f"No suspects among {rows:,} rows.")
        return
    table = Table("row", "answer", "likelier", "doubt", "text", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[3].justify = "right"
    for suspect in suspects[:SHOWN]:
        cells = (from_here(suspect.location), shorten(suspect.answer, 40), shorten(suspect.suggested, 40))
        table.add_row(*map(lines, cells), f"{suspect.doubt:.1f}", lines(shorten(suspect.text, TEXT_SHOWN)))
    console.print(f"{len(suspects):,} suspects among {rows:,} rows, the most doubtful first:")
    console.print(table)
    more = f"; {len(suspects) - SHOWN:,} more are" if len(suspects) > SHOWN else ""
    console.print(f"Why each of them is suspect stands in {from_here(str(file))}{more}" + (" there" if more else ""))
