"""`export`: a run's model for other programs, verified against the run before it is handed out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import LoraSpec, Session
from finetune.console import Console
from finetune.data.rows import Split
from finetune.disk.atomic import make_folder, new_folder, remove, rename
from finetune.disk.exports import Made, remember
from finetune.disk.identity import check_held_out
from finetune.disk.model_writer import KINDS, check_numbers
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import EnvironmentProblem, ExportFailed, Incompatible, RecipeError
from finetune.evaluation.evaluate import base_weights
from finetune.export import gguf_file
from finetune.export.families import family_of
from finetune.export.folders import BITS, MergedFolder, QuantisedFolder
from finetune.export.gguf_export import BASE, GgufAdapter, GgufFile, OllamaFolder
from finetune.export.measure import Making, Measured, chosen, measured
from finetune.export.merge import base_kind
from finetune.export.packages import optional
from finetune.export.prompt import Prompts
from finetune.export.verify import KEPT, Check, checks_table, model_checks, sentence, text_checks
from finetune.export.vocabulary import vocabulary
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import model_spec
from finetune.report.live_screen import with_progress
from finetune.report.summary import PAGE, write_page
from finetune.supervisor import announce_model
from finetune.text import harmless
from finetune.training.job import Job, making_ready, refuse_head

Target = MergedFolder | GgufFile
FILE = "export.json"
TYPES = dict.fromkeys(("merged", "mlx"), tuple(KINDS)) | dict.fromkeys(("gguf", "ollama"), tuple(gguf_file.KINDS))
_USUAL = "q8_0"
_FINER = {"q4_k_m": "q5_k_m", "q5_k_m": "q6_k", "q6_k": "q8_0", "q8_0": "f16"}


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
    check_options(recipe, to, kind, bits, adapter_alone)
    job = ready(opened, recipe, backend)
    some = chosen(job.prepared.held_out, rows)
    if len(some.examples) < 2:
        raise Incompatible(f"{opened.path}: no held-out rows, so an export cannot be verified; set data.test")
    prompts = Prompts(job.prepared, opened.always() or {})
    template, notes = prompts.template(job.tokenizer, opened.path.name)
    target = target_of(to, kind, bits, adapter_alone, job, template)
    path = output or opened.path / "exports" / target.name
    if path.exists() and not (path / FILE).exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(f"--output: {path} is there, and is no export; name another folder")
    make_folder(path.parent)
    making = made_ready(opened, job, prompts, template)
    measures, nearest = run_measured(making, some), precision(target, job, making.session)
    failed = path.with_name(f"{path.name}.failed")
    if (failed / FILE).exists():
        remove(failed)
    with new_folder(path) as hidden:
        checks = target.write(hidden, making)
        del making  # one model in memory at a time
        registry.free_dropped_models()
        checks += verified(target, hidden, job, prompts, measures, some, nearest)
        wrong = sentence(checks, target.name, target.finer)
        verification = {"run": str(opened.path), "name": target.name, "type": target.kind, "holds": wrong is None}
        _write_facts(
            hidden / FILE, verification | {"checks": [asdict(check) for check in checks], "notes": notes}, measures
        )
        Console().print(checks_table(checks, f"{path}, against the run's model"))
        if wrong:
            rename(hidden, failed)
            raise ExportFailed(f"{wrong}. What was written is in {failed}")
    _finish(opened, job, target, path, checks, notes)


def check_options(recipe: Recipe, to: str, kind: str | None, bits: int | None, adapter_alone: bool) -> None:
    """Raises RecipeError for options that do not go together, or not with the run."""
    refuse_head(recipe, "export")
    if to not in TYPES:
        raise RecipeError(f"--to {harmless(to)}: there are {', '.join(TYPES)}")
    if bits is not None and (to != "mlx" or bits not in BITS):
        raise RecipeError(f"--bits {bits}: belongs to --to mlx, and is {', '.join(map(str, BITS))}")
    if adapter_alone and to != "gguf":
        raise RecipeError("--adapter: belongs to --to gguf; PEFT and mlx-lm load the run's folder adapter/ as it is")
    types = TYPES["merged" if adapter_alone else to]
    if kind is not None and (bits is not None or kind not in types):
        what = "with --bits there is none" if bits is not None else f"for this export there are {', '.join(types)}"
        raise RecipeError(f"--type {harmless(kind)}: {what}")
    why = "this run trained the whole model, and has no adapter" if recipe.method == "full" else ""
    why = "llama.cpp does not know lora.dora" if recipe.lora.dora else why
    if adapter_alone and why:
        raise RecipeError(f"--adapter: {why}; use --to gguf without --adapter")


def ready(opened: RunFolder, recipe: Recipe, backend: str | None) -> Job:
    """The run's job. Raises as `making_ready`, and Incompatible where base or held-out rows are not the run's."""
    job = with_progress(making_ready(recipe, backend, opened.path))
    check_run_base(opened, job.folder)
    check_held_out(opened.path, job.prepared, "Put the rows back as they were")
    if job.prepared.task == "preference":  # what is verified is how the model answers
        return replace(job, prepared=replace(job.prepared, task="generation"))
    return job


def target_of(to: str, kind: str | None, bits: int | None, adapter_alone: bool, job: Job, template: str) -> Target:
    """What the options ask for. Raises EnvironmentProblem or BackendError, before anything is loaded or measured, where
    a package is missing, and for a model or a tokenizer that is not written so, or that its program reads otherwise.
    """
    if to in ("gguf", "ollama"):
        optional("gguf")
        optional("xllamacpp")
        if "_k" in (kind or ""):
            optional("libgguf", ", or use --type q8_0, which does not need it")
        family_of(job.folder)
        vocabulary(job.folder, template)
    elif to == "mlx":
        optional("mlx_lm", extra="mlx")
        if not job.folder.packed:  # else the merged model is another kind than its base
            whole = replace(model_spec(job.recipe, job.folder), quantize="none")
            registry.check_model(to, whole, LoraSpec(1, 1.0))
    if job.recipe.method == "lora" or bits is not None:  # else no weight of the base is written, or compared
        check_numbers(job.folder)
    if adapter_alone:
        packed = job.recipe.quantize != "none" or job.folder.packed
        finer = "use --to gguf without --adapter: the adapter was trained on weights of 4 bits" if packed else ""
        return GgufAdapter("gguf-adapter", kind or "f16", finer)
    if to in ("gguf", "ollama"):
        kind = kind or _USUAL
        finer = f"use --type {_FINER[kind]}" if kind in _FINER else ""
        return (GgufFile if to == "gguf" else OllamaFolder)(f"{to}-{kind}", kind, finer)
    if bits is not None:
        finer = "use --bits 8, or --to merged" if bits < 8 else "use --to merged"
        return QuantisedFolder(f"mlx-{bits}bit", f"{bits}bit", finer, to, bits)
    kind = kind or ("f32" if job.recipe.method == "full" else base_kind(job.folder.weights))
    return MergedFolder(f"merged-{kind}", kind, "", to if to == "mlx" else None)


def made_ready(opened: RunFolder, job: Job, prompts: Prompts, template: str) -> Making:
    """The run's model, loaded. Raises Incompatible for an adapter that does not fit."""
    adapter = read_trained(opened)
    session = job.open(adapter)
    adapter = replace(adapter, tensors=session.trained())  # by the checkpoint's names
    return Making(job, session, adapter, prompts, template)


def precision(target: Target, job: Job, session: Session) -> str:
    """What bounds how near the models can be: the type of the file, or what the device or llama.cpp computes with."""
    if target.finer:
        return "quantised"
    half = registry.describe(job.backend, job.recipe.device)["half"]
    number = model_spec(job.recipe, job.folder).number_type(registry.device_kind(session.device), half)
    kinds = [target.kind, *(short for short, name in KINDS.items() if name == number)]
    if isinstance(target, GgufFile):
        kinds.append("f16")  # llama.cpp reads some functions from tables of 16 bits
    return max(kinds, key=tuple(KINDS).index)


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
    prompts: Prompts,
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
        checks = text_checks(export, job.tokenizer, prompts)
        found = with_progress(measured(export.session, job, rows, "export", export.stops))
    except OSError as error:  # of a library or its server: the disk was written to before
        raise EnvironmentProblem(f"{target.name}: what was written cannot be loaded ({error})") from error
    (path / BASE).unlink(missing_ok=True)  # needed by the verification alone
    return [*checks, *model_checks(*run, found, nearest)]


def _write_facts(file: Path, verification: dict[str, Any], measures: tuple[Measured, Measured]) -> None:
    verification |= {name: model.evaluation.summary() for name, model in zip(("base", "tuned"), measures, strict=True)}
    file.write_text(json.dumps(verification, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
