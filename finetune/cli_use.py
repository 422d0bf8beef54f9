"""The command line of the commands that use a run, from `predict` to `runs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import DataError, RecipeError
from finetune.options import (
    AdapterAlone,
    Backend,
    Bits,
    Columns,
    ExportFolder,
    ExportTo,
    MaxTokens,
    NumberType,
    RunPath,
    System,
    Temperature,
    Tools,
    VerifiedRows,
)
from finetune.startup import begin

MOST = 16_000_000  # characters of a prompt


def predict(
    folder: RunPath,
    data: Annotated[str, typer.Argument(metavar="FILE", help="Rows without answers: any file that training reads.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Written: .jsonl or .csv.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace the output file where there is one.")] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The most tokens in an answer; the recipe's evaluate.max_tokens if not given."),
    ] = None,
    backend: Backend = None,
) -> None:
    """Label or answer a file's rows with a run's model."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.predict import run

    run(opened, recipe, data, output, force, max_tokens, backend)


def generate(
    folder: RunPath,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The input text; - reads it from standard input.")
    ] = None,
    row: Annotated[
        str | None, typer.Option("--row", metavar="FILE:LINE", help="Instead of PROMPT: a row, as training reads it.")
    ] = None,
    columns: Columns = None,
    system: System = None,
    tools: Tools = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model instead of the tuned model.")] = False,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    backend: Backend = None,
) -> None:
    """Answer one prompt with a run's model."""
    if (prompt is None) == (row is None) or (row is not None and (columns or system or tools)):
        raise RecipeError("give a PROMPT, or --row FILE:LINE alone: a row brings its columns, system text and tools")
    question = sys.stdin.read(MOST + 1) if prompt == "-" else prompt
    if question is not None and (not question.strip() or len(question) > MOST):
        raise DataError(
            "the prompt is empty" if not question.strip() else f"the prompt is longer than {MOST:,} characters"
        )
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.chat import run

    run(opened, recipe, question, columns or [], system, tools, base, temperature, max_tokens, backend, row)


def chat(
    folder: RunPath,
    columns: Columns = None,
    system: System = None,
    tools: Tools = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model instead of the tuned model.")] = False,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 512,
    backend: Backend = None,
) -> None:
    """Talk to a run's model. An empty line ends it."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.chat import run

    run(opened, recipe, None, columns or [], system, tools, base, temperature, max_tokens, backend)


def export(
    folder: RunPath,
    to: ExportTo,
    kind: NumberType = None,
    bits: Bits = None,
    adapter: AdapterAlone = False,
    output: ExportFolder = None,
    rows: VerifiedRows = 50,
    backend: Backend = None,
) -> None:
    """Write the model for other programs, and verify it."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(folder)
    begin()
    from finetune.commands.export import run

    run(opened, recipe, to, kind, bits, adapter, output, rows, backend)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that the runs are in.")] = Path("runs"),
) -> None:
    """List a folder's runs: state, model, data, gain."""
    begin()
    from finetune.commands.runs import run

    run(folder)
