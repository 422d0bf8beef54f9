"""Tables of `finetune plan`: time, memory, largest fitting model, other machines, steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table
from rich.text import Text

from backends import registry
from backends.memory_plan import first_adapted
from backends.model_folder import ModelFolder
from backends.streaming import frozen_file_bytes
from finetune.console import lines
from finetune.data.collate import step_indices
from finetune.data.rows import Example, Prepared
from finetune.evaluation.read_ahead import AHEAD
from finetune.events import by_part
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, scale_in_words, trainable_numbers
from finetune.report.tables import figures_table
from finetune.text import duration
from finetune.training.budget import Workload
from finetune.training.extra_evaluations import Beside
from finetune.training.forecast import Forecast
from finetune.training.largest import largest_model, longest_row
from finetune.training.objective import objective_of
from finetune.training.predicted_time import validations
from finetune.training.rate_race import RACE
from finetune.training.rate_rule import LANES

POSITIONS = 2**20  # of a model that does not say how many it takes


def held_as_here(work: Workload, here: Forecast) -> Workload:
    """With blocks computed again, and read from the disk, as the forecast says."""
    return replace(work, model=replace(work.model, checkpointing=here.recomputed, streamed=here.streamed))


def time_table(recipe: Recipe, prepared: Prepared, seconds: dict[str, float], asked: Beside | None) -> Table:
    """The parts of the run, and how much of what each does."""
    held_out, valid = len(prepared.held_out.examples), len(prepared.valid.examples)
    steps = make_plan(recipe, len(prepared.train.examples)).steps
    counts = {
        AHEAD: "one pass",
        "head": f"{len(prepared.train.examples) + valid:,} rows",
        "references": f"{len(prepared.train.examples) + valid + held_out * (prepared.test is not None):,} rows",
        "base model": f"{held_out:,} rows",
        RACE: f"{len(LANES)} rates",
        "training": f"{steps:,} steps",
        "validation": f"{validations(recipe, prepared):,} x {valid:,} rows",
        "tuned model": f"{held_out:,} rows",
        **(asked.counts() if asked else {}),
    }
    table = figures_table("part", "work", "time")
    parts = by_part(seconds)
    for name, count in counts.items():
        if whole := parts.get(name):
            table.add_row(name, count, duration(whole))
    table.add_row(Text("whole run", "bold"), "", Text(duration(sum(seconds.values())), "bold"))
    return table


def memory_table(work: Workload, here: Forecast, streamed: int) -> Table:
    """streamed: bytes on the disk of a model that is."""
    table = figures_table("part", "GB")
    for name, value in vars(here.needed).items():
        if value:
            what = "gradient, moments, best" if name == "adapter" and work.lora.whole else name.replace("_", " ")
            table.add_row(what, f"{value / 1e9:.2f}")
    table.add_row(Text("peak", "bold"), Text(f"{here.needed.peak / 1e9:.2f}", "bold"))
    if here.memory is not None:
        table.add_row("free", f"{here.memory / 1e9:.2f}")
    if kept := streamed if here.streamed else work.kept_on_disk(here.device):
        table.add_row("temporary file on disk (frozen blocks)", f"{kept / 1e9:.2f}")
    if here.streamed:
        of_pass = frozen_file_bytes(work.architecture, first_adapted(work.adapted))
        table.add_row("frozen blocks read from the disk, in a pass", f"{of_pass / 1e9:.2f}")
    return table


def largest_table(folder: ModelFolder, work: Workload, here: Forecast, memory: float) -> Table:
    """memory: bytes that are free here."""
    costs = registry.costs(here.backend, here.device)
    work = replace(work, model=replace(work.model, checkpointing=True)) if work.unsettled else work
    table = figures_table("what", "largest")
    longest = longest_row(work, costs, memory, folder.positions or POSITIONS)
    table.add_row("train.max_length, tokens", f"{longest:,}" if longest else "none")
    table.add_row("model of configs/", largest_model(work, costs, memory) or "none")
    return table


def machines_table(forecasts: dict[str, Forecast]) -> Table:
    table = figures_table("machine", "peak, GB", "of", "fits", "tokens", "training", "TFLOPS", "reached")
    for name, found in forecasts.items():
        fits = Text("yes", "green") if found.fits else Text("no", "bold red")
        memory = "?" if found.memory is None else f"{found.memory / 1e9:.1f}"
        rate = f"{found.rate / 1e12:.3g}", f"{found.reached:.0%}"
        time = duration(found.seconds)
        how = [word for word in ("recomputed", "streamed") if getattr(found, word)]
        tokens = lines(f"{found.tokens:,}", *how)
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
    adapter = {scale_name: scale, "adapted layers": f"{len(modules):,}"}
    figures = {
        "optimiser steps" + ", at most" * plan.open_end: f"{plan.steps:,}",
        **({"validated and kept": "their average"} if plan.open_end else {}),
        "steps per epoch": f"{plan.steps_per_epoch:,}",
        "steps between validations": f"{plan.evaluate_every:,}",
        "steps between checkpoints": f"{plan.checkpoint_every:,}",
        **({} if minutes == "none" else {"minutes between checkpoints, at most": f"{minutes:g}"}),
        "warmup steps": f"{plan.warmup:,}",
        "rows of the first step": f"{len(first):,}",
        "its micro-batches, rows x tokens": shapes,
        **(adapter if recipe.method == "lora" else {}),
        "trainable parameters": f"{trainable_numbers(recipe, folder):,}",
        "numbers in the base's tensors": f"{total:,}",
    }
    table = figures_table("", "")
    table.show_header = False
    for name, figure in figures.items():
        table.add_row(name, figure)
    return table
