"""One run from recipe to report: measure the base, train, keep the adapter, measure the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import FloatArray, Session, TrainState
from finetune.check.show import as_text, headline
from finetune.check.survey import as_json, survey
from finetune.disk import checkpoint as checkpoints
from finetune.disk.adapter import check_base, start_from, write_adapter
from finetune.disk.atomic import new_folder, write_file
from finetune.disk.identity import check_identity, identity_of, read_identity
from finetune.disk.metrics import MetricsFile, read
from finetune.disk.run_folder import RunFolder, environment
from finetune.evaluation.evaluate import Evaluation, base_weights
from finetune.evaluation.verdict import Watch, divergence, overfitting_verdict
from finetune.events import Progress, Sink, reporter
from finetune.recipe.specs import lora_spec
from finetune.report.report import Report, compare, load_evaluation, save_evaluation
from finetune.report.summary import account_of, write_report
from finetune.training.budget import starting_tokens
from finetune.training.job import Job
from finetune.training.loop import Trainer


def train_run(job: Job, run: RunFolder, sink: Sink, stop: Callable[[], bool], resume: bool = False) -> Report:
    """Train to the end and report. Raises Interrupted after a checkpoint when `stop()` turns true."""
    identity = identity_of(job.recipe, job.prepared, job.folder)
    saved = _checkpoint_of(run, identity, sink) if resume else None
    if job.recipe.lora.start_from:
        check_base(Path(job.recipe.lora.start_from), job.folder, job.recipe.model.path)
    run.write_identity(identity)
    facts = environment(job.backend, registry.describe(job.backend)) | {"remote_code": job.recipe.model.remote_code}
    run.write_json("environment.json", facts)
    run.write_json("data.json", account_of(job.prepared))
    checked = _check_data(job, run, sink, stop)
    session = job.open()
    base = _measure_base(job, run, session, sink, stop)
    showing = reporter("validation", sink, stop)
    with MetricsFile(run.metrics) as metrics:
        trainer = Trainer(
            session, job.prepared, job.recipe, run.checkpoints, identity, stop, showing, metrics.sync, _known(job, base)
        )
        metrics.truncate_after(-1 if saved is None else saved.state.step)
        if saved is not None:
            trainer.restore(saved)
            if lost := metrics.missing(saved.state.step):
                steps = f"{lost} of the {saved.state.step} steps done"
                sink(Progress(0, f"{run.metrics} has lost {steps}; the loss curve will lack them", 0, 0))
            for one in trainer.state.history():
                sink(one)  # so that the table on the screen is whole
            saved = None  # the session has its own
        else:
            trainer.state.micro_tokens = starting_tokens(job, session, sink)
            if job.recipe.lora.start_from:
                start_from(session, Path(job.recipe.lora.start_from), lora_spec(job.recipe))
        watch = Watch(job.folder.vocabulary, trainer.plan.warmup)
        for event in trainer.events():
            metrics.handle(event)
            sink(event)
            if notice := watch.look(event):
                sink(Progress(event.step, notice, 0, 0))
    assert trainer.best is not None  # the validation before the first step is always a best one
    session.set_state(TrainState(trainer.state.best_step, trainer.best, {}))
    save_adapter(job, run, trainer.best, session.scheme, trainer.state.best_step)
    tuned = job.measure(session, job.prepared.held_out, "tuned model", sink, stop)
    save_evaluation(run.evaluation("tuned"), tuned)
    report = build_report(job, run, session, trainer, base, tuned, checked)
    write_report(run, report)
    return report


def _check_data(job: Job, run: RunFolder, sink: Sink, stop: Callable[[], bool]) -> str:
    """`finetune check` of the run's data, in check.txt and check.json; its headline. A resumed run has it there."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return headline(json.loads((run.path / "check.json").read_text(encoding="utf-8")))
    found = survey(job.recipe, job.folder, job.tokenizer, Path.cwd(), reporter("data", sink, stop))
    write_file(run.path / "check.txt", as_text(found, job.tokenizer))
    run.write_json("check.json", values := as_json(found, job.tokenizer))  # last: it says that both are there
    return headline(values)


def build_report(
    job: Job, run: RunFolder, session: Session, trainer: Trainer, base: Evaluation | None, tuned: Evaluation, check: str
) -> Report:
    """The figures and verdicts of a finished run."""
    validations = tuple(trainer.state.history())
    kind = "test" if job.prepared.test else "validation"
    return Report(
        run=str(run.path),
        adapter=str(run.adapter),
        backend=job.backend,
        device=session.device,
        scheme=session.scheme,
        check=check,
        held_out=f"{len(job.prepared.held_out.examples)} {kind} rows",
        base=base,
        tuned=tuned,
        comparison=compare(base, tuned) if base else None,
        overfitting=overfitting_verdict(validations),
        divergence=divergence(read(run.metrics), job.folder.vocabulary, trainer.plan.warmup),
        validations=validations,
        best_step=trainer.state.best_step,
    )


def _checkpoint_of(run: RunFolder, identity: Mapping[str, Any], sink: Sink) -> checkpoints.Checkpoint | None:
    if earlier := read_identity(run.path):  # there before any checkpoint, as the measured base may be
        check_identity(earlier, identity)
    saved, messages = checkpoints.load_newest(run.checkpoints)
    for message in messages:
        sink(Progress(0, message, 0, 0))
    if saved is not None:
        check_identity(saved.identity, identity)
    return saved


def _measure_base(
    job: Job, run: RunFolder, session: Session, sink: Sink, stop: Callable[[], bool]
) -> Evaluation | None:
    """The base model on the held-out rows: measured once a run, kept for a resumed one."""
    if not job.recipe.evaluate.base:
        return None
    if found := load_evaluation(run.evaluation("base")):
        return found
    with base_weights(session):
        base = job.measure(session, job.prepared.held_out, "base model", sink, stop)
    save_evaluation(run.evaluation("base"), base)
    return base


def _known(job: Job, base: Evaluation | None) -> Evaluation | None:
    """The validation before the first step, where it would be of the same model and rows as the base's measurement.

    A resumed run reads the same figures from evaluation-base.json. A validation writes no answers.
    """
    if base is None or job.prepared.held_out is not job.prepared.valid or job.recipe.lora.start_from:
        return None
    return base if job.prepared.task == "classification" else replace(base, accuracy=None)


def save_adapter(job: Job, run: RunFolder, tensors: Mapping[str, FloatArray], scheme: str, step: int) -> None:
    """The adapter folder, whole or absent, with the tokenizer and template it was trained with."""
    base = job.recipe.model.path if not job.recipe.model.path.startswith("builtin:") else str(job.folder.path)
    facts = {
        "base_fingerprint": job.folder.fingerprint,
        "scheme": scheme,
        "step": step,
        "template": job.prepared.template,
        "prompt": job.recipe.prompt.model_dump(mode="json"),
    }
    with new_folder(run.adapter) as folder:
        write_adapter(folder, tensors, lora_spec(job.recipe), base, job.folder.blocks, facts)
        job.tokenizer.save_pretrained(folder)
