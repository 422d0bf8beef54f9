"""`plan`: the whole run, shown before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
from finetune.data.collate import collate, micro_batches, step_indices
from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Example
from finetune.recipe.load import dump_recipe
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec
from finetune.report.live_screen import with_progress
from finetune.report.row_tokens import highlighted
from finetune.report.tables import account_notes, account_table
from finetune.text import duration, from_here
from finetune.training.budget import Forecast, forecast_here, forecast_on, workload
from finetune.training.job import beyond_context, refuse_unfit, set_up

_AGREE = 1e-3  # nats per token, in float32; models of mlx-lm and transformers differ by 3e-4 at most


def run(recipe: Recipe, compare: bool) -> None:
    """Print the recipe, the prepared rows, the steps, the backends and the forecast."""
    console = Console()
    console.rule("recipe, every default written out")
    console.print(Syntax(dump_recipe(recipe), "yaml", background_color="default"))
    setup = set_up(recipe)
    folder, tokenizer = setup.folder, setup.tokenizer
    try:
        backend = registry.choose(recipe.backend)
    except BackendError:  # the table of backends says why
        pass
    else:
        setup.check_backend(backend)
    prepared = with_progress(prepare(recipe, tokenizer, base=None, clock=now()))
    refuse(prepared, recipe)
    refuse_unfit(setup, prepared)
    console.rule("data, as they will be trained on")
    console.print(account_table(prepared))
    for note in (*folder.notes, *account_notes(prepared)):
        console.print(note, soft_wrap=True)
    if beyond := beyond_context(folder, prepared):
        console.print(beyond, soft_wrap=True)
    console.print(f"task: {prepared.task}; rows read as: {prepared.format}; template: {prepared.template!r}")
    for example in prepared.train.examples[:2]:
        console.print()
        console.print(f"{from_here(example.location)}; supervised tokens are marked:", soft_wrap=True)
        console.print(highlighted(example, tokenizer))
    console.rule("work")
    console.print(steps_table(recipe, len(prepared.train.examples), prepared.train.examples))
    modules = folder.lora_modules(lora_spec(recipe))
    trainable = lora_spec(recipe).trainable(modules)
    total = sum(int(np.prod(shape)) for shape in folder.shapes.values())
    console.print(f"trainable: {trainable:,} parameters in {len(modules)} layers; the base's tensors hold {total:,}")
    console.rule("backends on this machine")
    console.print(backends_table(recipe))
    console.rule("memory and time, before anything is loaded")
    for part in forecast(recipe, folder, prepared.train.examples):
        console.print(part)
    if compare:
        console.print(compare_backends(recipe, folder, prepared.train.examples[:4]))


def steps_table(recipe: Recipe, rows: int, examples: Sequence[Example]) -> Table:
    found = make_plan(recipe, rows)
    first = step_indices(rows, recipe.train.batch_size, recipe.seed, 0)
    micro = micro_batches([examples[i] for i in first], recipe.train.tokens_at_once)
    table = Table(show_header=False)
    table.add_row("optimiser steps", f"{found.steps} ({found.steps_per_epoch} an epoch of {rows} examples)")
    table.add_row("validation", f"every {found.evaluate_every} steps")
    minutes = recipe.train.checkpoint_minutes
    timed = "" if minutes == "none" else f", and after {minutes:g} minutes without one"
    table.add_row("checkpoint", f"every {found.checkpoint_every} steps{timed}")
    table.add_row("warmup", f"{found.warmup} steps")
    table.add_row("the first step", f"{len(first)} examples in micro-batches {[b.inputs.shape for b in micro]}")
    lora = recipe.lora
    table.add_row("adapter scale", f"alpha / rank = {lora.alpha:g} / {lora.rank} = {lora.alpha / lora.rank:g}")
    return table


def forecast(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> Iterator[RenderableType]:
    """A table of this machine and of others, and what the memory here is made of."""
    work = workload(recipe, folder, examples)
    asked = None if recipe.train.micro_tokens == "auto" else recipe.train.micro_tokens
    forecasts: dict[str, Forecast] = {}
    here: Forecast | None = None
    with suppress(BackendError):
        here = forecast_here(work, registry.choose(recipe.backend), asked)
        forecasts[f"here ({here.backend})"] = here
    forecasts |= {machine.name: forecast_on(machine, work, backend, asked) for backend, machine in registry.machines()}
    yield _forecast_table(forecasts)
    rates = ". ".join(f"{name}: {found.rate}" for name, found in forecasts.items())
    yield lines(
        "Times are for training alone. Those of other machines are estimates from their makers' rates of matrix "
        f"products and an assumed share of them; none was measured. {rates}.",
        style="dim",
    )
    if here:
        parts = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in vars(here.needed).items() if value)
        yield f"here, in GB: {parts}"
        if kept := work.kept_on_disk(here.device):
            yield f"frozen blocks' hidden states, kept in a temporary file: {kept / 1e9:.2f} GB"


def _forecast_table(forecasts: Mapping[str, Forecast]) -> Table:
    table = Table("machine", "peak memory", "of", "", "tokens at once", "per epoch")
    marks: dict[bool | None, str | Text] = {None: "", True: "fits", False: Text("does not fit", "bold red")}
    for name, found in forecasts.items():
        memory = "?" if found.memory is None else f"{found.memory / 1e9:.1f} GB"
        peak, time = f"{found.needed.peak / 1e9:.2f} GB", duration(found.seconds)
        tokens = lines(f"{found.tokens:,}", *(["recomputed"] if found.recomputed else []))
        table.add_row(lines(name), peak, memory, marks[found.fits], tokens, time)
    return table


def backends_table(recipe: Recipe) -> Table:
    table = Table("backend", "here", "what it would do with this recipe")
    try:
        chosen = registry.choose(recipe.backend)
    except BackendError:
        chosen = ""
    for name in registry.NAMES:
        reason = registry.probe(name)
        if reason is None:
            first, *more = described(name, recipe.device)
            scheme = registry.four_bit(name)
            packed = f"weights in {scheme}" if scheme else "no 4-bit"
            weights = "weights as they are" if recipe.quantize == "none" else packed
            table.add_row(name, "chosen" if name == chosen else "works", lines(f"{weights}; {first}", *more))
        else:
            table.add_row(name, "no", lines(reason))
    return table


def compare_backends(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> Table:
    """Log-probabilities of a few rows under every backend of `auto`, in float32: they should agree to about 1e-4."""
    table = Table("backend", "mean log-probability", "largest difference from the first", title="Same rows, same base")
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
    table.caption = _agreement(table.row_count, worst)
    return table


def _agreement(backends: int, worst: float) -> str:
    if backends < 2:
        return "one backend works here, so there is nothing to compare"
    if worst <= _AGREE:
        return f"they compute the same model (differences up to {_AGREE:g} are rounding)"
    return (
        f"they compute different models (differences up to {_AGREE:g} are rounding); train on none before you know why"
    )
