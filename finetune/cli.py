"""The command line. Light on purpose: every command imports what it needs when it runs."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import DiskError, FinetuneError

app = typer.Typer(
    name="finetune",
    help="One recipe fine-tunes a language model with LoRA or QLoRA, on MLX or CUDA, and says whether it got better.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe, such as lora.rank=16.", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]
Backend = Annotated[str | None, typer.Option("--backend", help="mlx, torch or reference, instead of the recipe's.")]
Alone = Annotated[bool, typer.Option("--no-supervisor", help="Train in this very process, as debuggers need it.")]


@app.command()
def demo(
    backend: Backend = None,
    output: Annotated[str, typer.Option(help="The folder in which the run makes its folder.")] = "runs",
    alone: Alone = False,
) -> None:
    """Measure, fine-tune with QLoRA and measure again: an embedded model on embedded reviews, offline."""
    from finetune.recipe.locate import demo_recipe

    _train(demo_recipe(), [f"output={output}"], backend, alone)


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="A data file to look at.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the recipe is written.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="A model folder or hub id.")] = "builtin:reviews-base",
) -> None:
    """Look at a data file and write a commented starter recipe for it."""
    from finetune.commands.init import init as run

    run(data, output, model)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    compare: Annotated[bool, typer.Option(help="Load the model in every backend here and compare logits.")] = False,
) -> None:
    """Show the resolved recipe, the prepared data, the steps and what each backend would do; train nothing."""
    from finetune.recipe.load import load_recipe

    found = load_recipe(recipe, overrides or [])  # first: a mistake in it needs none of the libraries below
    from finetune.commands.plan import plan as run

    run(found, compare)


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="DATA|RECIPE", help="A data file, or a recipe.", show_default=False)],
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is found to this file too.")] = None,
) -> None:
    """Say what the data are, what is wrong with them and how they will be trained on; load no model."""
    from finetune.recipe.load import recipe_of

    found = recipe_of(target, overrides or [])  # first: a mistake in it needs none of the libraries below
    from finetune.commands.check import check as run

    run(found, json_file)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, backend: Backend = None, alone: Alone = False) -> None:
    """Measure the base model, fine-tune it, measure the tuned one, and keep the adapter."""
    _train(recipe, overrides or [], backend, alone)


@app.command()
def resume(run: RunPath, backend: Backend = None, alone: Alone = False) -> None:
    """Go on with a stopped run from its newest good checkpoint, on any backend."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(run)
    _supervised(alone)
    from finetune.commands.train import resume as go_on

    go_on(opened, recipe, backend)


@app.command("eval")
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option(help="Other rows to measure on: a file of the same format.")] = None,
    backend: Backend = None,
) -> None:
    """Measure a run's base and tuned model again, on its held-out rows or on others."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(run)
    from finetune.commands.evaluate import evaluate as measure

    measure(opened, recipe, data, backend)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(help="The input text; - reads it from standard input.")],
    base: Annotated[bool, typer.Option("--base", help="Ask the base model instead of the tuned one.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    backend: Backend = None,
) -> None:
    """Answer one prompt with a run's model."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(run)
    from finetune.commands.chat import generate as answer

    answer(opened, recipe, prompt, base, temperature, max_tokens, backend)


@app.command()
def chat(
    run: RunPath,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model instead of the tuned one.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    backend: Backend = None,
) -> None:
    """Talk to a run's model; an empty line ends it."""
    from finetune.disk.run_folder import open_existing

    opened, recipe = open_existing(run)
    from finetune.commands.chat import chat as talk

    talk(opened, recipe, base, temperature, max_tokens, backend)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    import json

    from finetune.recipe.schema import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema() | {"title": "finetune recipe"}, indent=2))


@app.command()
def doctor() -> None:
    """Say which backends work on this machine, and why not."""
    from finetune.commands.doctor import doctor as run

    run()


def _train(recipe: Path, overrides: list[str], backend: str | None, alone: bool) -> None:
    from finetune.recipe.load import load_recipe

    found = load_recipe(recipe, [*overrides, *([f"backend={backend}"] if backend else [])])
    _supervised(alone)  # a mistake in the recipe is told before a second process is started for it
    from finetune.commands.train import train as run

    run(found, recipe.stem)


def _supervised(alone: bool) -> None:
    """From here on in a child process, but for `alone`, and for Windows, which has no signals to hand on."""
    if not alone and os.name == "posix":
        from finetune.supervisor import supervise

        supervise()


def main() -> None:
    """Run the command; every error of the user's is one message and its own exit code."""
    try:
        app()
    except FinetuneError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("out of memory; a smaller model, quantize: 4bit, or a lower train.max_length helps", 5)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _fail(f"{error.filename or 'output'}: {error.strerror}", DiskError.exit_code)
    except Exception as error:
        code = _backend_code(error)
        if code is None:
            raise
        _fail(str(error), code)


def _backend_code(error: Exception) -> int | None:
    """The exit code of an error from behind the boundary; None: our own bug, with its traceback."""
    from backends.interface import BackendError, IncompatibleState, OutOfMemory

    for kind, code in ((BackendError, 7), (IncompatibleState, 8), (OutOfMemory, 5)):
        if isinstance(error, kind):
            return code
    return None


def _fail(message: str, code: int) -> None:
    print(f"finetune: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
