"""The command line of the commands that examine runs, from `eval` to `curve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import RecipeError
from finetune.options import (
    AtLeast,
    Backend,
    RunPath,
    SuiteFile,
    WithoutRows,
)
from finetune.startup import begin

if TYPE_CHECKING:  # a command's help needs none of them
    from finetune.disk.run_folder import RunFolder
    from finetune.recipe.schema import Recipe


def evaluate(
    folder: RunPath,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Other rows to measure on, in the same format.")
    ] = None,
    suite: SuiteFile = None,
    at_least: AtLeast = None,
    backend: Backend = None,
) -> None:
    """Measure both models of a run again, or on other rows."""
    if (data and suite) or (at_least is not None and not suite):
        raise RecipeError("give --data FILE alone, or --suite FILE, and --at-least SHARE with that")
    if at_least is not None and not 0 < at_least < 1:
        raise RecipeError(f"--at-least {at_least:g}: must be above 0 and below 1, which no number of cases can show")
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    if suite:
        _ask(opened, recipe, suite, at_least, backend)
        return
    from finetune.commands.evaluate import run

    run(opened, recipe, data, backend)


def _ask(opened: RunFolder, recipe: Recipe, suite: str, at_least: float | None, backend: str | None) -> None:
    from finetune.commands.suite import run

    run(opened, recipe, suite, at_least, backend)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of two or more runs, in their order.")
    ],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure all runs anew, on the held-out rows of the first.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure all runs anew, on the rows of this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The page; compare.html in the last run if not given.")
    ] = None,
    without_rows: WithoutRows = False,
    backend: Backend = None,
) -> None:
    """Compare runs: errors fixed, what changed, what to add."""
    from finetune.disk.run_folder import open_existing

    if len(folders) < 2:
        raise RecipeError("compare needs two runs or more: finetune compare RUN RUN")
    for folder in folders:
        open_existing(folder)
    begin()
    from finetune.commands.compare import run

    run(folders, measure, data, html, not without_rows, backend)


def report(
    folder: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of report.html in the run's folder.")
    ] = None,
    without_rows: WithoutRows = False,
) -> None:
    """Write a run's page anew, or without its data."""
    from finetune.disk.run_folder import open_existing

    open_existing(folder)
    begin()
    from finetune.commands.report import run

    run(folder, output, not without_rows)


def duel(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of one run (against its base) or of several.")
    ],
    base: Annotated[bool, typer.Option("--base", help="The base model of the first run takes part.")] = False,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to answer, instead of the runs' recorded answers.")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kept there; votes.jsonl in the first run if not given.")
    ] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, help="The most votes to ask for now.")] = None,
    backend: Backend = None,
) -> None:
    """Vote blindly between two models' answers; say which is stronger."""
    from finetune.disk.run_folder import open_existing

    opened = [open_existing(folder) for folder in folders]
    begin()
    from finetune.commands.duel import run

    run(opened, base, data, votes, most, backend)


def benchmark(
    folder: RunPath,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval, with commas.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Their data, as FOLDER/ORG/NAME; the hub if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt; the tasks' own if not given.")
    ] = None,
    backend: Backend = None,
) -> None:
    """Measure a run on tasks of lm-eval."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks: names no task; write some, such as arc_easy,hellaswag")
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.benchmark import run

    run(opened, recipe, names, data, limit, shots, backend)


def suspects(
    folder: RunPath,
    prove: Annotated[
        float | None,
        typer.Option("--prove", metavar="MINUTES", min=0.1, help="Train again without them, within this time."),
    ] = None,
    backend: Backend = None,
) -> None:
    """List rows that hurt: wrong labels, contradictions."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.suspects import run

    run(opened, recipe, prove, backend)


def next_rows(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Rows to choose from: any file that training reads.")],
    rows: Annotated[int, typer.Option("--rows", min=1, max=100_000, help="How many to choose.")] = 50,
    run_folder: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="The newest finished run in runs/ if not given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=".jsonl or .csv; in the run's folder if not given."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file where there is one.")] = False,
    backend: Backend = None,
) -> None:
    """Choose rows of a pool to label next."""
    begin()
    from finetune.commands.next import run

    run(pool, rows, run_folder, output, force, backend)


def curve(folder: RunPath, backend: Backend = None) -> None:
    """Say whether more rows would help."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.curve import run

    run(opened, recipe, backend)
