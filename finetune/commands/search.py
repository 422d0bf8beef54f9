"""`search`: other settings than the recipe's, tried within a budget of time; the best of them is a finished run."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path

from finetune.commands.train import StopFlag, exit_stopped, show_run
from finetune.console import Console, lines
from finetune.disk.atomic import remove, write_file
from finetune.disk.lock import locked
from finetune.disk.run_folder import RunFolder, create
from finetune.disk.run_list import BEST
from finetune.errors import Interrupted, RecipeError
from finetune.events import stoppable
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.summary import print_report
from finetune.report.tables import figures_table
from finetune.run import Run
from finetune.supervisor import announce_run, process_id
from finetune.text import duration, from_here
from finetune.training.job import refuse_unused_accelerator
from finetune.training.memory_settings import settle_memory
from finetune.training.search import BudgetTooShort, Search
from finetune.training.search_ledger import AS_GOOD, LEDGER, Ledger, Stage, read_ledger
from finetune.training.suite_prompts import ready_with_suite

RECIPE = "search.yaml"
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(budget: str) -> float:
    """Of 90s, 30m, 2h. Raises RecipeError."""
    try:
        seconds = float(budget[:-1]) * UNITS[budget[-1:]]
    except (KeyError, ValueError):
        seconds = 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise RecipeError(f"--budget {budget}: write a number and its unit: 90s, 30m or 2h")
    return seconds


def run(recipe: Recipe, name: str = "", budget: str = "", stopped: Path | None = None) -> None:
    """A new search in a folder that begins with `name`, or the `stopped` one within what is left of its budget.

    One that is refused, as its budget is too short, leaves no folder. Exits with 130 or 143 when a signal asks it to
    stop.
    """
    began = time.monotonic()
    ledger = read_ledger(stopped) if stopped else Ledger(seconds_of(budget))
    refuse_unused_accelerator(recipe)
    folder = RunFolder(stopped) if stopped else None
    with StopFlag().listening() as stop, ExitStack() as held:
        try:
            ready = ready_with_suite(recipe, _begun(folder) if folder else None)
            job = with_progress(stoppable(ready, stop, "preparing the data"), stop)
            job = with_progress(settle_memory(job, None), stop)
            if not job.prepared.valid.examples:
                raise RecipeError("data.valid: a search needs validation rows to compare trials by")
            if folder is None:
                folder = _create(job.recipe, name, ledger)
            held.enter_context(locked(folder.path, process_id()))
            announce_run(folder.path)
            search = Search(job, folder, stop, began)
            winner = with_progress(search.events(), stop)
            if not search.best.report.exists():
                lock = held.enter_context(locked(search.best.path, process_id()))
                print_report(show_run(Run(search.job_of(winner), search.best, lock), stop, resume=True))
            _show(search, winner)
        except BudgetTooShort:
            assert folder is not None  # it was made, and trained in
            held.close()
            remove(folder.path)
            raise
        except (Interrupted, KeyboardInterrupt) as end:
            exit_stopped(end, stop, folder)


def _create(recipe: Recipe, name: str, ledger: Ledger) -> RunFolder:
    folder = create(recipe, f"{name}-search")
    ledger.write(folder)  # first of all: a search that is killed keeps its budget
    write_file(folder.path / RECIPE, dump_recipe(recipe))
    folder.recipe.unlink()  # a search is not a run; its best is
    return folder


def _begun(search: RunFolder) -> Path | None:
    """A run of the search, whose time chat templates write."""
    runs = [search.path / BEST, search.path / "trials" / "00"]
    return next((path for path in runs if (path / "identity.json").exists()), None)


def verdict(search: Search, winner: int) -> str:
    """What is best; or that nothing else was tried, and the budget that suffices for that."""
    ledger = search.ledger
    finished = {stage.trial: stage.loss for stage in ledger.stages if stage.finished}
    if not finished.keys() - {0}:
        enough = math.ceil(ledger.predicted(search.steps_of(1)) / 60) if len(search.trials) > 1 else 0
        more = f"allow --budget {enough}m or more" if enough else "there is none to try"
        return (
            f"No other setting was trained to its end: {more}. The recipe has a validation loss of {finished[0]:.4f}."
        )
    if winner == 0:
        own, best = finished[0], min(loss for loss in finished.values() if loss is not None)
        better = f", of all {best:.4f}" if own is not None and best < own else ""
        return f"The default was as good: validation loss {own:.4f}{better} (within {AS_GOOD:.0%})."
    before = "diverged" if finished[0] is None else f"has {finished[0]:.4f}"
    settings = search.trials[winner].settings
    return f"Best: {settings}, validation loss {finished[winner]:.4f}; the default {before}."


def _finished_first(stage: Stage) -> tuple[bool, float]:
    """And of those the lowest loss."""
    return not stage.finished, math.inf if stage.loss is None else stage.loss


def _show(search: Search, winner: int) -> None:
    """The verdict first, then what each trial came to."""
    console, ledger = Console(), search.ledger
    ends = [stage for trial in range(len(search.trials)) if (stage := ledger.last(trial))]
    console.print(lines(verdict(search, winner), style="bold"))
    table = figures_table("trial", "validation loss", "steps", "time")
    for stage in sorted(ends, key=_finished_first):
        taken = sum(each.seconds for each in ledger.stages if each.trial == stage.trial)
        loss = "diverged" if stage.loss is None else f"{stage.loss:.4f}"
        steps = f"{stage.steps:,}" if stage.finished else f"{stage.steps:,}, left out"
        table.add_row(lines(search.trials[stage.trial].settings), loss, steps, duration(taken))
    console.print(table)
    skipped = f"; trials left out for want of time: {len(ledger.skipped)}" if ledger.skipped else ""
    console.print(lines(f"{duration(ledger.spent)} of {duration(ledger.budget)} for the trials{skipped}"))
    console.print(lines(f"The winner's run: {from_here(str(search.best.path))}; figures: {LEDGER} beside it"))
