"""One run from recipe to report: measure the base, train, keep the adapter, measure the tuned model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import FloatArray, IncompatibleState, LoraSpec, Session, TrainState
from backends.model_folder import fingerprint, read_config
from finetune.check.record import as_json, headline
from finetune.check.show import as_text
from finetune.check.survey import survey
from finetune.disk import checkpoint as checkpoints
from finetune.disk.adapter import adapter_config, read_adapter, write_adapter
from finetune.disk.atomic import new_folder, write_file
from finetune.disk.metrics import MetricsFile, read
from finetune.disk.run_folder import RunFolder, environment
from finetune.errors import Incompatible
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.verdict import overfitting_verdict
from finetune.events import Progress
from finetune.report.report import Report, compare, load_evaluation, save_evaluation, write_report
from finetune.training.budget import starting_tokens
from finetune.training.job import Job, Sink, account_of, identity_of, lora_spec, reporter, vocabulary_of
from finetune.training.loop import Trainer
from finetune.watch import Watch, divergence

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def train_run(job: Job, run: RunFolder, sink: Sink, stop: Callable[[], bool], resume: bool = False) -> Report:
    """Train to the end and report. Raises Interrupted after a checkpoint when `stop()` turns true."""
    identity = identity_of(job)
    saved = _checkpoint_of(run, identity, sink) if resume else None
    if job.recipe.lora.start_from:
        check_base(Path(job.recipe.lora.start_from), job.model, job.recipe.model.path)
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
        watch = Watch(vocabulary_of(job.model), trainer.plan.warmup)
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
    found = survey(job.recipe, job.model, job.tokenizer, Path.cwd(), reporter("data", sink, stop))
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
        divergence=divergence(read(run.metrics), vocabulary_of(job.model), trainer.plan.warmup),
        validations=validations,
        best_step=trainer.state.best_step,
    )


def _checkpoint_of(run: RunFolder, identity: Mapping[str, Any], sink: Sink) -> checkpoints.Checkpoint | None:
    if earlier := run.read_identity():  # there before any checkpoint, as the measured base may be
        checkpoints.check_identity(earlier, identity)
    saved, messages = checkpoints.load_newest(run.checkpoints)
    for message in messages:
        sink(Progress(0, message, 0, 0))
    if saved is not None:
        checkpoints.check_identity(saved.identity, identity)
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


@contextmanager
def base_weights(session: Session) -> Iterator[None]:
    """The session as the base model: every B is zero inside, and the adapter comes back after."""
    state = session.get_state()
    zero = {name: t * 0 if name.endswith("lora_B") else t for name, t in state.adapter.items()}
    session.set_state(TrainState(state.step, zero, state.moments))
    try:
        yield
    finally:
        session.set_state(state)


def start_from(session: Session, folder: Path, lora: LoraSpec) -> None:
    """Take an adapter folder (PEFT or mlx-lm) as the start. Raises Incompatible when it does not fit."""
    adapter = read_adapter(folder)
    if adapter.rank != lora.rank or abs(adapter.scale - lora.scale) > 1e-9:
        raise Incompatible(
            f"lora.start_from: {folder} has rank {adapter.rank} and scale {adapter.scale:g}; the recipe has rank "
            f"{lora.rank} and scale {lora.scale:g}. Set lora.rank: {adapter.rank} and "
            f"lora.alpha: {adapter.scale * adapter.rank:g}"
        )
    try:
        session.set_state(TrainState(0, adapter.tensors, {}))
    except IncompatibleState as error:
        raise Incompatible(f"lora.start_from: {folder} does not fit this model and these targets: {error}") from None


def check_base(adapter: Path, model: Path, name: str | None = None) -> None:
    """Raises Incompatible when the adapter folder was trained on another base than `model`.

    Our adapters say the fingerprint of their base; others only its name, and that is compared where both it and
    `name` are hub ids: without the owner, as mirrors are common.
    """
    config = adapter_config(adapter)
    facts, trained = config.get("finetune"), config.get("base_model_name_or_path")
    if isinstance(facts, dict) and "base_fingerprint" in facts:
        if facts["base_fingerprint"] != fingerprint(model):
            raise Incompatible(f"{adapter} was trained on other base weights than those in {model}; give the same base")
    elif isinstance(trained, str) and name and _other_name(trained, name):
        raise Incompatible(
            f"{adapter} was trained on {trained}, and model.path is {name}; give the same base, or where they are "
            f"the same weights, write {name} into base_model_name_or_path of its adapter_config.json"
        )


def _other_name(first: str, second: str) -> bool:
    if not (_HUB_ID.fullmatch(first) and _HUB_ID.fullmatch(second)):
        return False
    return first.split("/")[1].lower() != second.split("/")[1].lower()


def save_adapter(job: Job, run: RunFolder, tensors: Mapping[str, FloatArray], scheme: str, step: int) -> None:
    """The adapter folder, whole or absent, with the tokenizer and template it was trained with."""
    base = job.recipe.model.path if not job.recipe.model.path.startswith("builtin:") else str(job.model)
    config = read_config(job.model)
    blocks = int((config.get("text_config") or config)["num_hidden_layers"])
    facts = {
        "base_fingerprint": fingerprint(job.model),
        "scheme": scheme,
        "step": step,
        "template": job.prepared.template,
        "prompt": job.recipe.prompt.model_dump(mode="json"),
    }
    with new_folder(run.adapter) as folder:
        write_adapter(folder, tensors, lora_spec(job.recipe), base, blocks, facts)
        job.tokenizer.save_pretrained(folder)
