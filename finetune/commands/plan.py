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
from finetune.commands.doctor import described
from finetune.console import Console, lines
from finetune.data.clock import now
from finetune.data.collate import collate, step_indices
from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Example, Prepared
from finetune.events import by_part
from finetune.recipe.load import dump_recipe
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec, scale_in_words, trainable_numbers, with_classes
from finetune.report.live_screen import with_progress
from finetune.report.row_tokens import highlighted
from finetune.report.tables import account_notes, account_table, figures_table
from finetune.text import amount, duration, from_here
from finetune.training.budget import Forecast, Workload, forecast_here, forecast_on, workload
from finetune.training.job import beyond_context, refuse_unfit, set_up
from finetune.training.largest import largest_model, longest_row
from finetune.training.objective import objective_of
from finetune.training.outlook import seconds_of_parts, validations
from finetune.training.race import foretold_race
from finetune.training.suites import read_suite

POSITIONS = 2**20  # of a model that does not say how many it takes

_AGREE = 1e-3  # nats per token, in float32; models of mlx-lm and transformers differ by 3e-4 at most


def run(recipe: Recipe, compare: bool, largest: bool = False) -> None:
    """Print the answer, the time, the memory, the rows, the steps, the backends and the recipe.

    largest: also the longest row and the largest model that fit here.
    """
    console = Console()
    setup = set_up(recipe)
    folder, tokenizer = setup.folder, setup.tokenizer
    try:
        backend = registry.choose(recipe.backend)
    except BackendError:  # the table of backends says why
        backend = ""
    else:
        setup.check_backend(backend)
    prepared = with_progress(prepare(recipe, tokenizer, base=None, clock=now()))
    refuse(prepared, recipe)
    refuse_unfit(setup, prepared)
    recipe = with_classes(recipe, prepared.labels)
    for part in answer(recipe, folder, prepared, backend, largest):
        console.print(part)
    console.rule("rows", align="left")
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
    console.rule("steps", align="left")
    console.print(steps_table(recipe, folder, prepared.train.examples))
    if recipe.train.learning_rate == "auto":
        for line in foretold_race(recipe, folder, prepared, backend):
            console.print(line, soft_wrap=True)
    console.rule("backends on this machine", align="left")
    console.print(backends_table(recipe, backend))
    if compare:
        console.rule("same rows, same base, in float32", align="left")
        for part in compare_backends(recipe, folder, prepared.train.examples[:4]):
            console.print(part)
    console.rule("recipe, every default written out", align="left")
    console.print(Syntax(dump_recipe(recipe), "yaml", background_color="default"))


def answer(
    recipe: Recipe, folder: ModelFolder, prepared: Prepared, backend: str, largest: bool = False
) -> list[RenderableType]:
    """Whether the run fits here and how long it takes; what both are made of; other machines.

    backend: the one that is used here; empty: none works.
    """
    work = workload(recipe, folder, prepared.train.examples)
    asked = None if recipe.train.micro_tokens == "auto" else recipe.train.micro_tokens
    others = {machine.name: forecast_on(machine, work, name, asked) for name, machine in registry.machines()}
    heading = Text("other machines (not measured: makers' rates, and an assumed share of them)", "bold")
    machines: list[RenderableType] = [Text(), heading, machines_table(others)]
    if not backend:
        return [Text("no backend works here: see below", "bold red"), *machines]
    here = forecast_here(work, backend, asked)
    work = recomputing(work, here.recomputed)
    seconds = seconds_of_parts(recipe, prepared, work, here.speed)
    parts: list[RenderableType] = [verdict(here, sum(seconds.values())), Text()]
    parts += [Text("time", "bold"), time_table(recipe, prepared, seconds), Text()]
    parts += [Text("memory", "bold"), memory_table(work, here)]
    if largest and here.memory is not None:
        parts += [Text(), Text("largest that fits here", "bold"), largest_table(folder, work, here, here.memory)]
    return [*parts, *machines]


def recomputing(work: Workload, again: bool) -> Workload:
    return replace(work, model=replace(work.model, checkpointing=again))


def verdict(here: Forecast, seconds: float) -> Text:
    needed = amount(here.needed.peak)
    memory = "" if here.memory is None else f" of {amount(here.memory)} free"
    time = f"about {duration(seconds)} in all"
    if here.fits is False:
        return lines(f"does not fit here: it needs {needed}{memory}; {time} where it fits", style="bold red")
    start = "fits here" if here.fits else "runs here"
    return lines(f"{start} ({here.backend}): {needed}{memory}, {time}", style="bold green")


def time_table(recipe: Recipe, prepared: Prepared, seconds: dict[str, float]) -> Table:
    """The parts of the run, and how much of what each does."""
    held_out, valid = len(prepared.held_out.examples), len(prepared.valid.examples)
    steps = make_plan(recipe, len(prepared.train.examples)).steps
    counts = {
        "head": f"{len(prepared.train.examples) + valid:,} rows",
        "references": f"{len(prepared.train.examples) + valid + held_out * (prepared.test is not None):,} rows",
        "base model": f"{held_out:,} rows",
        "training": f"{steps:,} steps",
        "validation": f"{validations(recipe, prepared):,} x {valid:,} rows",
        "tuned model": f"{held_out:,} rows",
    }
    table = figures_table("part", "work", "time")
    parts = by_part(seconds)
    for name, count in counts.items():
        if whole := parts.get(name):
            table.add_row(name, count, duration(whole))
    table.add_row(Text("whole run", "bold"), "", Text(duration(sum(seconds.values())), "bold"))
    return table


def memory_table(work: Workload, here: Forecast) -> Table:
    table = figures_table("part", "GB")
    for name, value in vars(here.needed).items():
        if value:
            table.add_row(name.replace("_", " "), f"{value / 1e9:.2f}")
    if here.recomputed:
        table.add_row("blocks computed again in the backward pass", "yes")
    table.add_row(Text("peak", "bold"), Text(f"{here.needed.peak / 1e9:.2f}", "bold"))
    if here.memory is not None:
        table.add_row("free", f"{here.memory / 1e9:.2f}")
    if kept := work.kept_on_disk(here.device):
        table.add_row("temporary file on disk (frozen blocks)", f"{kept / 1e9:.2f}")
    return table


def largest_table(folder: ModelFolder, work: Workload, here: Forecast, memory: float) -> Table:
    """memory: bytes that are free here."""
    costs = registry.costs(here.backend, here.device)
    work = recomputing(work, True) if work.unsettled else work
    table = figures_table("what", "largest")
    longest = longest_row(work, costs, memory, folder.positions or POSITIONS)
    table.add_row("train.max_length, tokens", f"{longest:,}" if longest else "none")
    table.add_row("model of configs/", largest_model(work, costs, memory) or "none")
    return table


def machines_table(forecasts: dict[str, Forecast]) -> Table:
    table = figures_table("machine", "peak, GB", "of", "fits", "tokens", "training", "TFLOPS", "share")
    for name, found in forecasts.items():
        fits = Text("yes", "green") if found.fits else Text("no", "bold red")
        memory = "?" if found.memory is None else f"{found.memory / 1e9:.1f}"
        rate = f"{found.rate / 1e12:.3g}", f"{found.reached:.0%}"
        time = duration(found.seconds)
        tokens = lines(f"{found.tokens:,}", *(["recomputed"] if found.recomputed else []))
        table.add_row(lines(name), f"{found.needed.peak / 1e9:.2f}", memory, fits, tokens, time, *rate)
    return table


def steps_table(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> Table:
    rows, plan = len(examples), make_plan(recipe, len(examples))
    first = step_indices(rows, recipe.train.batch_size, recipe.seed, 0)
    micro = objective_of(recipe).batches([examples[i] for i in first], recipe.train.tokens_at_once, True)
    modules, lora = folder.lora_modules(lora_spec(recipe)), recipe.lora
    total = sum(int(np.prod(shape)) for shape in folder.shapes.values())
    minutes = recipe.train.checkpoint_minutes
    shapes = ", ".join(f"{batch.inputs.shape[0]} x {batch.inputs.shape[1]}" for batch in micro)
    scale_name, scale = scale_in_words(lora)
    figures = {
        "optimiser steps" + ", at most" * plan.open_end: f"{plan.steps:,}",
        "steps per epoch": f"{plan.steps_per_epoch:,}",
        "steps between validations": f"{plan.evaluate_every:,}",
        "steps between checkpoints": f"{plan.checkpoint_every:,}",
        **({} if minutes == "none" else {"minutes between checkpoints, at most": f"{minutes:g}"}),
        "warmup steps": f"{plan.warmup:,}",
        "rows of the first step": f"{len(first):,}",
        "its micro-batches, rows x tokens": shapes,
        scale_name: scale,
        "adapted layers": f"{len(modules):,}",
        "trainable parameters": f"{trainable_numbers(recipe, folder):,}",
        "numbers in the base's tensors": f"{total:,}",
    }
    if recipe.evaluate.suite:
        figures["cases of the suite"] = f"{len(read_suite(recipe.evaluate.suite)):,}"
    table = figures_table("", "")
    table.show_header = False
    for name, figure in figures.items():
        table.add_row(name, figure)
    return table


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
        spec = replace(model_spec(recipe, folder), quantize="none", dtype="float32", checkpointing=False)
        session = registry.open_session(name, spec, lora_spec(recipe), optim_spec(recipe), recipe.seed)
        found = session.score(batch).logprob
        del session  # two models at once may not fit
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
