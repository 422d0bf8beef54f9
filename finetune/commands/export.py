"""`export`: a run's model for other programs, verified against the run before it is handed out."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.console import Console
from finetune.data.rows import Split
from finetune.disk.adapter import check_base, read_adapter
from finetune.disk.atomic import new_folder, remove
from finetune.disk.exports import Made, remember
from finetune.disk.identity import check_held_out
from finetune.disk.run_folder import RunFolder
from finetune.errors import EnvironmentProblem, ExportFailed, Incompatible, RecipeError
from finetune.evaluation.evaluate import Evaluation, base_weights
from finetune.export.choose import check_options, precision, target_of
from finetune.export.gguf_export import BASE
from finetune.export.making import Making, Target
from finetune.export.measure import Measured, chosen, evaluated, measured
from finetune.export.prompt import travelling_template
from finetune.export.verify import KEPT, Check, checks_table, model_checks, sentence, text_checks
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
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
    refuse_head(recipe, "export")
    adapter = read_adapter(opened.adapter)
    job = with_progress(making_ready(recipe, backend, opened.path))
    check_base(opened.adapter, job.folder)
    check_held_out(opened.path, job.prepared, "Put the rows back as they were")
    if job.prepared.task == "preference":  # what is verified is how the model answers
        job = replace(job, prepared=replace(job.prepared, task="generation"))
    rows_measured = chosen(job.prepared.held_out, rows)
    if len(rows_measured.examples) < 2:
        raise Incompatible(f"{opened.path}: no held-out rows, so an export cannot be verified; set data.test")
    target = target_of(to, kind, bits, adapter_alone, job)
    path = _free(output or opened.path / "exports" / target.name)
    making = made_ready(opened, job, adapter)
    measures, notes, always = run_measured(making, rows_measured), list(making.travels.notes), making.always
    nearest, console = precision(target, job, making.session), Console()
    failed = path.with_name(f"{path.name}.failed")
    with new_folder(path) as hidden:
        checks = target.write(hidden, making)
        del making  # one model in memory at a time
        gc.collect()
        checks += verified(target, hidden, job, always, measures, rows_measured, nearest)
        (hidden / FILE).write_text(_as_json(opened, target, checks, notes, measures), encoding="utf-8")
        console.print(checks_table(checks, f"{path}, against the run's model"))
        if wrong := sentence(checks, f"{to} {target.kind}", target.finer):
            _move_entries(hidden, failed)
            raise ExportFailed(f"{wrong}. What was written is in {failed}")
    if (failed / FILE).exists():
        remove(failed)
    _finish(console, opened, target, path, checks, notes)


def _move_entries(hidden: Path, failed: Path) -> None:
    """`new_folder` removes the folder itself after a failure."""
    with new_folder(failed) as folder:
        for entry in list(hidden.iterdir()):
            entry.rename(folder / entry.name)


def made_ready(opened: RunFolder, job: Job, adapter: Any) -> Making:
    always = opened.always() or {}
    assert job.prepared.renderer is not None
    travels = travelling_template(job.prepared.renderer, job.prepared.format, job.tokenizer, always, opened.path.name)
    session = job.open(adapter)
    adapter = replace(adapter, tensors=session.get_state().adapter)  # by the checkpoint's names
    return Making(job, session, adapter, travels, always)


def run_measured(making: Making, rows: Split) -> tuple[Evaluation, Measured]:
    job, session = making.job, making.session
    stops = job.prepared.stop_tokens
    tuned = with_progress(measured(session, job, rows, "the run's model", stops))
    with base_weights(session):
        base = with_progress(evaluated(session, job, rows, "base model", stops))
    return base, tuned


def verified(
    target: Target,
    path: Path,
    job: Job,
    always: Any,
    run: tuple[Evaluation, Measured],
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


def _free(path: Path) -> Path:
    """The same. Raises RecipeError where something is there that is no export."""
    if path.exists() and not (path / FILE).exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(f"--output: {path} is there, and is no export; name another folder")
    return path


def _as_json(
    opened: RunFolder, target: Target, checks: Sequence[Check], notes: Sequence[str], run: tuple[Evaluation, Measured]
) -> str:
    values = {
        "run": str(opened.path),
        "name": target.name,
        "type": target.kind,
        "holds": all(check.holds != "no" for check in checks),
        "checks": [asdict(check) for check in checks],
        "notes": list(notes),
        "base": run[0].summary(),
        "tuned": run[1].evaluation.summary(),
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _finish(
    console: Console, opened: RunFolder, target: Target, path: Path, checks: Sequence[Check], notes: list[str]
) -> None:
    """Says what was made and how to use it; the run remembers it."""
    result = {check.name: check for check in checks}
    kept, errors = result[KEPT], result["log-probabilities"]
    line = f"log-probabilities: {errors.result}, on {errors.on}; tuning that is kept: {kept.result}"
    commands = target.commands(path.resolve())
    remember(opened, Made(str(path.resolve()), target.kind, line, commands, notes))
    warned = [check for check in checks if check.holds == "warning"]
    for note in (*notes, *(f"{check.name}: {check.result} {check.where}".strip() for check in warned)):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{path}: does what the run's model does. Serve it with", soft_wrap=True)
    for command in commands:
        console.print(f"  {command}", no_wrap=True, overflow="ignore", crop=False)  # to be pasted
