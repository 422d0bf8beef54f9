"""The command line. Light on purpose: every command imports what it needs when it runs."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli_examine import benchmark, compare, curve, duel, evaluate, next_rows, report, suspects
from finetune.cli_use import chat, export, generate, predict, runs
from finetune.errors import explain
from finetune.options import Alone, Backend, Devices, Overrides, RecipeFile, RunPath
from finetune.startup import ask_apart, begin
from finetune.streams import guard, outlive_readers

START, TRAIN, USE, TOOLS = "Start", "Train", "Use", "Tools"  # panels of --help, in this order

app = typer.Typer(name="finetune", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"finetune {version('recipe-finetune')}")
        raise typer.Exit


def _finished(result: object, **options: object) -> None:
    """Raises EnvironmentProblem where a library wanted to connect and then went on without."""
    from finetune.connections import check

    check()


@app.callback(result_callback=_finished)
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a language model with LoRA or QLoRA from one recipe, and measure whether it got better."""


@app.command(rich_help_panel=START)
def demo(
    overrides: Overrides = None,
    backend: Backend = None,
    output: Annotated[str, typer.Option(help="The run's folder is made in this folder.")] = "runs",
    devices: Devices = None,
    alone: Alone = False,
) -> None:
    """Measure, fine-tune and measure again, with a built-in model and data, offline."""
    from finetune.recipe.locate import demo_recipe

    _train(demo_recipe(), [f"output={output}", *(overrides or [])], backend, devices, alone)


@app.command(rich_help_panel=START)
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data file, folder or pattern.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")] = "builtin:reviews-base",
    text: Annotated[str | None, typer.Option(help="The column of the texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of the labels.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The column of the prompts.")] = None,
    completion: Annotated[str | None, typer.Option(help="The column of the answers.")] = None,
) -> None:
    """Look at a data file and write a commented recipe for it."""
    begin()
    from finetune.commands.init import run

    columns = {"text": text, "label": label, "prompt": prompt, "completion": completion}
    run(data, output, model, {part: column for part, column in columns.items() if column is not None})


@app.command(rich_help_panel=START)
def check(
    target: Annotated[str, typer.Argument(metavar="DATA|RECIPE", help="A data file, or a recipe.", show_default=False)],
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings to this file too.")
    ] = None,
) -> None:
    """Report bad rows, lengths, duplicates, leaks, balance and personal data."""
    from finetune.recipe.load import recipe_of

    recipe = recipe_of(target, overrides or [])  # first: a mistake in it needs none of the libraries below
    begin()
    from finetune.commands.check import run

    run(recipe, json_file)


@app.command(rich_help_panel=START)
def plan(
    file: RecipeFile,
    overrides: Overrides = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the backends' log-probabilities.")] = False,
    largest: Annotated[
        bool, typer.Option("--largest", help="Name the longest row and the largest model that fit.")
    ] = False,
    devices: Devices = None,
) -> None:
    """Show rows, steps, memory and time. Trains nothing."""
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(file, overrides or [])  # first: a mistake in it needs none of the libraries below
    begin()
    if not recipe.model.remote_code:
        ask_apart(recipe.backend, recipe.device)
    from finetune.commands.plan import run

    run(recipe, compare, largest, devices)


@app.command(rich_help_panel=TRAIN)
def train(
    file: RecipeFile,
    overrides: Overrides = None,
    backend: Backend = None,
    devices: Devices = None,
    alone: Alone = False,
) -> None:
    """Measure the model, fine-tune it, measure again."""
    _train(file, overrides or [], backend, devices, alone)


@app.command(rich_help_panel=TRAIN)
def search(
    file: RecipeFile,
    overrides: Overrides = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="For all of it: 90s, 30m or 2h.")] = "30m",
    backend: Backend = None,
    alone: Alone = False,
) -> None:
    """Try other rates, ranks, epochs, layers; keep the best."""
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(file, [*(overrides or []), *([f"backend={backend}"] if backend else [])])
    begin(alone)
    from finetune.commands.search import run

    run(recipe, file.stem, budget)


@app.command(rich_help_panel=TRAIN)
def resume(folder: RunPath, backend: Backend = None, devices: Devices = None, alone: Alone = False) -> None:
    """Resume a stopped run or search, on any backend."""
    if (folder / "search.yaml").is_file():
        _go_on_searching(folder, backend, alone)
        return
    from finetune.disk.run_folder import open_existing

    stopped, recipe = open_existing(folder)
    recipe = recipe.model_copy(update={"backend": backend}) if backend else recipe
    _launch(devices, recipe.backend, alone)
    begin(alone)
    from finetune.commands.train import run

    run(recipe, folder.name, stopped)


app.command("eval", rich_help_panel=USE)(evaluate)
app.command(rich_help_panel=USE)(compare)
app.command(rich_help_panel=USE)(report)
app.command(rich_help_panel=USE)(duel)
app.command(rich_help_panel=USE)(benchmark)
app.command(rich_help_panel=USE)(predict)
app.command(rich_help_panel=USE)(suspects)
app.command("next", rich_help_panel=USE)(next_rows)
app.command(rich_help_panel=USE)(curve)
app.command(rich_help_panel=USE)(generate)
app.command(rich_help_panel=USE)(chat)
app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(runs)


@app.command(rich_help_panel=TOOLS)
def doctor() -> None:
    """Show which backends work here, and why not."""
    begin()
    from finetune.commands.doctor import run

    run()


@app.command(rich_help_panel=TOOLS)
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    import json

    from finetune.recipe.schema import Recipe

    print(json.dumps(Recipe.model_json_schema() | {"title": "finetune recipe"}, indent=2))


def _go_on_searching(folder: Path, backend: str | None, alone: bool) -> None:
    from finetune.recipe.load import load_written

    recipe = load_written(folder / "search.yaml", [f"backend={backend}"] if backend else [])
    begin(alone)
    from finetune.commands.search import run

    run(recipe, stopped=folder)


def _train(file: Path, overrides: list[str], backend: str | None, devices: str | None, alone: bool) -> None:
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(file, [*overrides, *([f"backend={backend}"] if backend else [])])
    _launch(devices, recipe.backend, alone)
    begin(alone)  # a mistake in the recipe is reported before a second process is started for it
    from finetune.commands.train import run

    run(recipe, file.stem)


def _launch(devices: str | None, backend: str, alone: bool) -> None:
    if devices is not None:
        from finetune.launch import launch

        launch(devices, backend, alone)


def main() -> None:
    """Run the command. Every error that the user can fix is one message and one exit code."""
    gc.set_threshold(700, 10, 1000)  # loading torch makes millions of objects and no garbage: a fifth of the start
    outlive_readers()
    guard()
    if sys.stdout.isatty() or sys.stderr.isatty() or os.environ.get("FORCE_COLOR"):
        from finetune.console import colour_help

        colour_help()
    try:
        app(prog_name="finetune")
    except BaseException as error:
        end = explain(error)
        if end is None:
            raise
        print(f"finetune: {end[0]}", file=sys.stderr)
        sys.exit(end[1])
