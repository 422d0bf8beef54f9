"""`export`: a run's model for other programs, verified against the run before it is handed out."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from finetune.console import Console
from finetune.data.rows import Split
from finetune.disk.adapter import Adapter
from finetune.disk.atomic import new_folder, remove, rename
from finetune.disk.exports import Made, remember
from finetune.disk.identity import check_held_out
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained import check_run_base, read_trained
from finetune.errors import EnvironmentProblem, ExportFailed, Incompatible, RecipeError
from finetune.evaluation.evaluate import base_weights
from finetune.export.choose import check_options, precision, refuse_adapter, target_of
from finetune.export.gguf_export import BASE
from finetune.export.making import Making, Target
from finetune.export.measure import Measured, chosen, measured
from finetune.export.prompt import travelling_template
from finetune.export.verify import KEPT, Check, checks_table, model_checks, sentence, text_checks
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.summary import PAGE, write_page
from finetune.supervisor import announce_model
from finetune.training.job import Job, making_ready, refuse_head

FILE = "export.json"


def run(
    opened: RunFolder,
    recipe: Recipe,
    to: str,
    kind: str | None,
    bits: int | None,
    adapter_alone: bool,
    output: Path | None,
    rows: int,
    backend: str | None,
) -> None:
    """Writes the export's folder, whole or not at all, and prints how it compares with the run's model.

    Raises ExportFailed where it does something else; the folder NAME.failed then holds what was written.
    """
    check_options(to, kind, bits, adapter_alone)
    if adapter_alone:
        refuse_adapter(recipe)
    adapter, job = read_trained(opened), ready(opened, recipe, backend)
    some = chosen(job.prepared.held_out, rows)
    if len(some.examples) < 2:
        raise Incompatible(f"{opened.path}: no held-out rows, so an export cannot be verified; set data.test")
    target = target_of(to, kind, bits, adapter_alone, job)
    path = output or opened.path / "exports" / target.name
    if path.exists() and not (path / FILE).exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(f"--output: {path} is there, and is no export; name another folder")
    making = made_ready(opened, job, adapter)
    measures, nearest = run_measured(making, some), precision(target, job, making.session)
    always, notes = making.always, list(making.notes)
    failed = path.with_name(f"{path.name}.failed")
    if (failed / FILE).exists():
        remove(failed)
    with new_folder(path) as hidden:
        checks = target.write(hidden, making)
        del making  # one model in memory at a time
        gc.collect()
        checks += verified(target, hidden, job, always, measures, some, nearest)
        wrong = sentence(checks, target.name, target.finer)
        told = {"run": str(opened.path), "name": target.name, "type": target.kind, "holds": wrong is None}
        told |= {"checks": [asdict(check) for check in checks], "notes": notes}
        told |= {name: model.evaluation.summary() for name, model in zip(("base", "tuned"), measures, strict=True)}
        (hidden / FILE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        Console().print(checks_table(checks, f"{path}, against the run's model"))
        if wrong:
            rename(hidden, failed)
            raise ExportFailed(f"{wrong}. What was written is in {failed}")
    _finish(opened, job, target, path, checks, notes)


def ready(opened: RunFolder, recipe: Recipe, backend: str | None) -> Job:
    """The run's job. Raises as `making_ready`, and Incompatible where base or held-out rows are not the run's."""
    refuse_head(recipe, "export")
    job = with_progress(making_ready(recipe, backend, opened.path))
    check_run_base(opened, job.folder)
    check_held_out(opened.path, job.prepared, "Put the rows back as they were")
    if job.prepared.task == "preference":  # what is verified is how the model answers
        return replace(job, prepared=replace(job.prepared, task="generation"))
    return job


def made_ready(opened: RunFolder, job: Job, adapter: Adapter) -> Making:
    always = opened.always() or {}
    assert job.prepared.renderer is not None
    prompt = travelling_template(job.prepared.renderer, job.prepared.format, job.tokenizer, always, opened.path.name)
    session = job.open(adapter)
    adapter = replace(adapter, tensors=session.get_state().adapter)  # by the checkpoint's names
    return Making(job, session, adapter, *prompt, always)


def run_measured(making: Making, rows: Split) -> tuple[Measured, Measured]:
    """The base, without answers, and the run's model."""
    job, session = making.job, making.session
    stops = job.prepared.stop_tokens
    tuned = with_progress(measured(session, job, rows, "the run's model", stops))
    with base_weights(session):
        return with_progress(measured(session, job, rows, "base model", stops, answered=0)), tuned


def verified(
    target: Target,
    path: Path,
    job: Job,
    always: Mapping[str, str | None],
    run: tuple[Measured, Measured],
    rows: Split,
    nearest: str,
) -> list[Check]:
    """The checks of what is in `path`. run: base and tuned model on the rows.

    Raises EnvironmentProblem where it cannot be loaded again.
    """
    announce_model(path)
    try:
        export = target.open(path, job)
        checks = text_checks(export, job, always)
        found = with_progress(measured(export.session, job, rows, "export", export.stops))
    except OSError as error:  # of a library or its server: the disk was written to before
        raise EnvironmentProblem(f"{target.name}: what was written cannot be loaded ({error})") from error
    (path / BASE).unlink(missing_ok=True)  # needed by the verification alone
    return [*checks, *model_checks(*run, found, nearest)]


def _finish(opened: RunFolder, job: Job, target: Target, path: Path, checks: list[Check], notes: list[str]) -> None:
    """Says what was made and how to use it; the run remembers it."""
    result, console = {check.name: check for check in checks}, Console()
    kept, errors = result[KEPT], result["log-probabilities"]
    line = f"log-probabilities: {errors.result}, on {errors.on}; tuning that is kept: {kept.result}"
    commands = target.commands(path.resolve(), job, opened.adapter.resolve())
    remember(opened, Made(str(path.resolve()), target.kind, line, commands, notes))
    if (opened.path / PAGE).exists():
        write_page(opened.path)
    warned = [f"{check.name}: {check.result} {check.where}".strip() for check in checks if check.holds == "warning"]
    for note in (*notes, *warned):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{path}: does what the run's model does. Serve it with", soft_wrap=True)
    for command in commands:
        console.print(f"  {command}", no_wrap=True, overflow="ignore", crop=False)  # to be pasted
