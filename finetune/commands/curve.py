"""`curve`: would more rows help? The run's recipe on fewer rows, and what follows for twice as many."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.check.curve_runs import curve, parts_of
from finetune.check.retrain import predicted_seconds
from finetune.console import Console, lines
from finetune.disk.identity import check_rows
from finetune.disk.metrics import read
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base
from finetune.errors import Incompatible
from finetune.evaluation.baselines import majority
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.learning_curve import SHARES, Outlook, costs_of, look_ahead
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.report import load_evaluation
from finetune.report.tables import figures_table
from finetune.text import duration
from finetune.training.job import making_ready
from finetune.training.memory_settings import settle_memory

SAYS = {
    "yes": "More rows help",
    "probably": "More rows will probably help",
    "hardly": "More rows would hardly help",
    "not to be told": "Whether more rows help cannot be told from these",
    "nothing learned": "Nothing is learned yet, so whether more rows help cannot be told",
}


def run(opened: RunFolder, recipe: Recipe, backend: str | None) -> None:
    """Writes curve.json into the run's folder, whole or not at all."""
    whole = load_evaluation(opened.evaluation("tuned"))
    if whole is None:
        raise Incompatible(f"{opened.path}: this run is not finished; resume it first")
    job = with_progress(making_ready(recipe, backend, opened.path))
    check_rows(opened.path, job.prepared, "Put the rows back as they were, or train a new run on the rows as they are")
    check_run_base(opened, job.folder)
    rows = [len(part) for part in parts_of(job.prepared, job.recipe.seed)]
    job = with_progress(settle_memory(job, opened.recomputed()))
    seconds = predicted_seconds(read(opened.metrics)) * (sum(SHARES) - 1)
    Console(stderr=True).print(lines(f"training on {rows[0]:,} and on {rows[1]:,} rows: about {duration(seconds)}"))
    made = with_progress(curve(job, job.open(), whole))
    ahead = look_ahead([costs_of(one) for one in made], _most_frequent(whole))
    opened.write_json("curve.json", _figures(rows, made, ahead))
    _show(rows, made, ahead)


def _accuracies(made: Sequence[Evaluation]) -> bool:
    return made[-1].accuracy is not None and bool(made[-1].labels)


def _most_frequent(whole: Evaluation) -> float | None:
    """The share of the most frequent label, where rows have labels."""
    best = majority(whole) if whole.labels else None
    return best and best[1]


def _expected(made: Sequence[Evaluation], ahead: Outlook) -> tuple[float, float]:
    """The interval after twice the rows, as people read it: of an accuracy, or of a loss."""
    return (1 - ahead.high, 1 - ahead.low) if _accuracies(made) else (ahead.low, ahead.high)


def _figures(rows: Sequence[int], made: Sequence[Evaluation], ahead: Outlook) -> dict[str, object]:
    parts = [{"rows": n, "loss": one.loss, "accuracy": one.accuracy} for n, one in zip(rows, made, strict=True)]
    measure, (low, high) = "accuracy" if _accuracies(made) else "loss", _expected(made, ahead)
    return {"measured": parts, "twice": {"rows": 2 * rows[-1], measure: [low, high]}, "helps": ahead.answer}


def _show(rows: Sequence[int], made: Sequence[Evaluation], ahead: Outlook) -> None:
    """The verdict first, then the figures."""
    console, low_high = Console(), _expected(made, ahead)
    shares = _accuracies(made)
    low, high = (f"{value:.1%}" if shares else f"{value:.4f}" for value in low_high)
    now = f"{made[-1].accuracy:.1%}" if shares else f"{made[-1].loss:.4f}"
    what = "accuracy" if shares else "loss"
    said = f"{SAYS[ahead.answer]}: with {2 * rows[-1]:,} rows expect {what} {low} to {high}, now {now}."
    console.print(lines(said, style="bold"))
    table = figures_table("training rows", *(["accuracy"] if shares else []), "loss", texts=0)
    for count, one in zip(rows, made, strict=True):
        table.add_row(f"{count:,}", *([f"{one.accuracy:.1%}"] if shares else []), f"{one.loss:.4f}")
    table.add_row(f"{2 * rows[-1]:,}", f"{low} to {high}", *([""] if shares else []))
    console.print(table)
