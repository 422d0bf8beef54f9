"""`plan`: the whole run, shown before anything is loaded or trained. The answer comes first, its reasons after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from backends import registry
from backends.interface import BackendError
from backends.model_folder import ModelFolder
from finetune.check.run_analysis import questions_of
from finetune.commands.doctor import described
from finetune.console import Console, lines
from finetune.data.collate import collate
from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Example, Prepared
from finetune.data.template_clock import now
from finetune.data.tokenizer import Tokenizer
from finetune.launch import processes
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec, with_classes
from finetune.report.live_screen import with_progress
from finetune.report.plan_tables import (
    held_as_here,
    largest_table,
    machines_table,
    memory_table,
    steps_table,
    time_table,
)
from finetune.report.row_tokens import highlighted
from finetune.report.tables import account_notes, account_table, figures_table
from finetune.text import amount, duration, from_here
from finetune.training.budget import workload
from finetune.training.extra_evaluations import Beside
from finetune.training.forecast import Forecast, forecast_here, forecast_on
from finetune.training.job import Job, beyond_context, recognised, refuse_unfit, set_up
from finetune.training.predicted_time import seconds_of_parts
from finetune.training.rate_race import race_lines
from finetune.training.read_ahead import kept_bytes
from finetune.training.suite_prompts import cases_of, suite_of

TIMED = "from matrix products timed now; a run corrects it by a few of its rows once its model is loaded"
ASSUMED = "TFLOPS: of matrix products, as the maker says; reached: the share of them that steps are assumed to reach"
_AGREE = 1e-3  # nats per token, in float32; models of mlx-lm and transformers differ by 3e-4 at most


def run(recipe: Recipe, compare: bool, largest: bool = False, devices: str | None = None) -> None:
    """Print the answer, the time, the memory, the rows, the steps, the backends and the recipe.

    largest: also the longest row and the largest model that fit here. devices: as `train` takes it.
    """
    console = Console()
    setup = set_up(recipe)
    folder, tokenizer = setup.folder, setup.tokenizer
    registry.check_ahead(recipe.backend, model_spec(recipe, folder), lora_spec(recipe))
    cases = cases_of(recipe)
    prepared = with_progress(prepare(recipe, tokenizer, base=None, clock=now()))
    try:
        backend = registry.choose(recipe.backend)
    except BackendError:  # the table of backends says why
        backend = ""
    else:
        setup.check_backend(recipe.backend)
    refuse(prepared, recipe)
    refuse_unfit(setup, prepared)
    known = recognised(recipe, prepared)
    suite = with_progress(suite_of(replace(setup, recipe=known), prepared, cases))
    job = Job(known, folder, tokenizer, backend, prepared, suite)
    count = processes(devices, backend) if devices and backend else 1
    recipe = with_classes(recipe, prepared.labels)
    for part in answer(recipe, folder, prepared, backend, largest, Beside(questions_of(job), suite), count):
        console.print(part)
    console.rule("rows", align="left")
    _print_rows(console, folder, tokenizer, prepared)
    console.rule("steps", align="left")
    console.print(steps_table(recipe, folder, prepared.train.examples))
    if recipe.train.learning_rate == "auto":
        for line in race_lines(recipe, folder, prepared, backend):
            console.print(line, soft_wrap=True)
    console.rule("backends on this machine", align="left")
    console.print(backends_table(recipe, backend))
    if compare:
        console.rule("same rows, same base, in float32", align="left")
        for part in compare_backends(recipe, folder, prepared.train.examples[:4]):
            console.print(part)
    console.rule("recipe, every default written out", align="left")
    console.print(Syntax(dump_recipe(recipe), "yaml", background_color="default"))


def _print_rows(console: Console, folder: ModelFolder, tokenizer: Tokenizer, prepared: Prepared) -> None:
    console.print(f"task: {prepared.task}; rows read as: {prepared.format}; template: {prepared.template!r}")
    console.print(account_table(prepared))
    for note in (*folder.notes, *account_notes(prepared)):
        console.print(note, soft_wrap=True)
    if beyond := beyond_context(folder, prepared):
        console.print(beyond, soft_wrap=True)
    for example in prepared.train.examples[:2]:
        console.print()
        console.print(f"{from_here(example.location)}; supervised tokens are marked:", soft_wrap=True)
        console.print(highlighted(example, tokenizer))


def answer(
    recipe: Recipe,
    folder: ModelFolder,
    prepared: Prepared,
    backend: str,
    largest: bool = False,
    aside: Beside | None = None,
    count: int = 1,
) -> list[RenderableType]:
    """Whether the run fits here and how long it takes; what both are made of; other machines.

    backend: the one that is used here; empty: none works. aside: what is asked of both models beside the held-out rows.
    count: of processes.
    """
    work = workload(recipe, folder, prepared.train.examples)
    asked = None if recipe.train.micro_tokens == "auto" else recipe.train.micro_tokens
    others = {machine.name: forecast_on(machine, work, name, asked) for name, machine in registry.machines()}
    heading = Text("other machines, not measured", "bold")
    machines: list[RenderableType] = [Text(), heading, machines_table(others), Text(ASSUMED, "dim")]
    if not backend:
        return [Text("no backend works here: see below", "bold red"), *machines]
    here = forecast_here(work, backend, asked, count)
    work = held_as_here(work, here)
    seconds = seconds_of_parts(recipe, prepared, work, here.speed, here.tokens, aside)
    parts: list[RenderableType] = [verdict(here, sum(seconds.values()), count), Text()]
    parts += [Text("time", "bold"), time_table(recipe, prepared, seconds, aside), Text(TIMED, "dim"), Text()]
    streamed = kept_bytes(recipe, prepared, work, here.device) if here.streamed else 0
    parts += [Text("memory", "bold"), memory_table(work, here, streamed)]
    if largest and here.memory is not None:
        parts += [Text(), Text("largest that fits here", "bold"), largest_table(folder, work, here, here.memory)]
    return [*parts, *machines]


def verdict(here: Forecast, seconds: float, count: int = 1) -> Text:
    needed = amount(here.needed.peak) if count == 1 else f"{amount(here.needed.peak)} in each of {count} processes"
    free = "free" if count == 1 else "free for it"
    memory = "" if here.memory is None else f" of {amount(here.memory)} {free}"
    time = f"{'about ' * (seconds >= 1)}{duration(seconds)} in all"
    if here.fits is False:
        return lines(f"does not fit here: it needs {needed}{memory}; {time} where it fits", style="bold red")
    start = "fits here" if here.fits else "runs here"
    again, read = "blocks computed again in the backward pass", "frozen blocks read from the disk"
    how = [again] * here.recomputed + [read] * here.streamed
    start += f", with {' and '.join(how)}" if how else ""
    return lines(f"{start} ({here.backend}): {needed}{memory}, {time}", style="bold green")


def backends_table(recipe: Recipe, chosen: str) -> Table:
    """Only what was chosen is loaded; where nothing was, each says why."""
    table = figures_table("backend", "here", "what it would do with this recipe", texts=3)
    for name in registry.NAMES:
        reason = None if chosen else registry.probe(name)
        if reason is not None:
            table.add_row(name, "no", lines(reason))
        elif name == chosen:
            first, *more = described(name, recipe.device)
            scheme = registry.four_bit(name)
            packed = f"weights in {scheme}" if scheme else "no 4-bit"
            weights = "weights as they are" if recipe.quantize == "none" else packed
            table.add_row(name, "chosen", lines(f"{weights}; {first}", *more))
        else:
            here = "installed" if registry.installed(name) else "not installed"
            table.add_row(name, here, "finetune doctor tells whether it works")
    return table


def compare_backends(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> list[RenderableType]:
    """What they say, and log-probabilities of a few rows under every backend of `auto`, in float32."""
    table = figures_table("backend", "mean log-probability", "largest difference from the first")
    batch, first, worst = collate(examples), None, 0.0
    for name in registry.automatic():
        if registry.probe(name):
            continue
        spec = replace(model_spec(recipe, folder), quantize="none", dtype="float32", checkpointing=False, folder=None)
        found = registry.logprobs(name, spec, lora_spec(recipe), optim_spec(recipe), recipe.seed, batch)
        first = found if first is None else first
        mean, apart = found.sum() / max(batch.weights.sum(), 1), float(np.abs(found - first).max())
        table.add_row(name, f"{mean:.5f}", f"{apart:.1e}")
        worst = float(np.maximum(worst, apart))  # NaN stays
    return [lines(_agreement(table.row_count, worst), style="bold"), table]


def _agreement(backends: int, worst: float) -> str:
    if backends < 2:
        return "one backend works here, so there is nothing to compare"
    if worst <= _AGREE:
        return f"they compute the same model (differences up to {_AGREE:g} are rounding)"
    return (
        f"they compute different models (differences up to {_AGREE:g} are rounding); train on none before you know why"
    )
