"""One run from recipe to report: prepare, measure the base, train, measure the tuned model, keep the adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import FloatArray, IncompatibleState, LoraSpec, ModelSpec, OptimSpec, Session, TrainState
from backends.model_files import fingerprint, read_config
from finetune import checkpoint as checkpoints
from finetune.adapter import read_adapter, write_adapter
from finetune.atomic import new_folder
from finetune.data.prepare import prepare
from finetune.errors import Incompatible
from finetune.evaluate import Evaluation, evaluate
from finetune.events import Event, Progress
from finetune.examples import Dataset, Prepared
from finetune.metrics import MetricsFile
from finetune.recipe import Recipe
from finetune.report import Report, compare, load_evaluation, save_evaluation, write_report
from finetune.run_folder import RunFolder, environment
from finetune.sources import model_folder
from finetune.tokenizer import load_tokenizer
from finetune.train import Interrupted, Trainer
from finetune.verdict import overfitting_verdict

Sink = Callable[[Event], None]
# Keys that change where or how fast a run goes, or whose effect the digests of rows and weights already hold.
_NOT_IDENTITY = {
    "output", "backend", "model.path", "model.revision", "model.dtype", "data.train", "data.valid", "data.test",
    "train.micro_tokens", "train.gradient_checkpointing", "evaluate.generate", "evaluate.max_tokens", "evaluate.base",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything a command needs once the recipe is read: data first, the model last."""

    recipe: Recipe
    backend: str
    model: Path
    tokenizer: Any
    prepared: Prepared

    def open(self) -> Session:
        """The live session; heavy from here on."""
        return registry.open_session(
            self.backend, model_spec(self.recipe, self.model), lora_spec(self.recipe), optim_spec(self.recipe),
            self.recipe.seed,
        )

    def decode(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def measure(
        self, session: Session, dataset: Dataset, what: str, sink: Sink, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """The same evaluation for every model. Raises Interrupted when asked to stop on the way."""

        def report(kind: str, done: int, total: int) -> None:
            sink(Progress(0, f"{what}: {kind}", done, total))
            if stop():
                raise Interrupted(f"stopped while measuring the {what}")

        settings = self.recipe.evaluate
        return evaluate(
            session,
            self.prepared,
            dataset,
            micro_tokens=self.recipe.train.micro_tokens,
            max_tokens=settings.max_tokens if settings.generate else 0,
            decode=self.decode,
            report=report,
        )


def load_job(recipe: Recipe, backend: str | None = None) -> Job:
    """Check the backend, find the model, read and prepare the data. No model is loaded."""
    chosen = registry.choose(backend or recipe.backend)
    model = model_folder(recipe.model)
    tokenizer = load_tokenizer(model)
    return Job(recipe, chosen, model, tokenizer, prepare(recipe, tokenizer, base=Path.cwd()))


def model_spec(recipe: Recipe, folder: Path) -> ModelSpec:
    return ModelSpec(folder, recipe.quantize, recipe.model.dtype, recipe.train.gradient_checkpointing)


def lora_spec(recipe: Recipe) -> LoraSpec:
    lora = recipe.lora
    return LoraSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=() if lora.targets == "all" else tuple(lora.targets),
        layers=None if lora.layers == "all" else lora.layers,
    )


def optim_spec(recipe: Recipe) -> OptimSpec:
    return OptimSpec(weight_decay=recipe.train.weight_decay, clip_norm=recipe.train.clip_norm)


def train_run(job: Job, run: RunFolder, sink: Sink, stop: Callable[[], bool], resume: bool = False) -> Report:
    """Train to the end and report. Raises Interrupted after a checkpoint when `stop()` turns true."""
    identity = identity_of(job)
    saved = _checkpoint_of(run, identity, sink) if resume else None
    run.write_json("environment.json", environment(job.backend, registry.describe(job.backend)))
    session = job.open()
    run.write_json("data.json", account_of(job.prepared))
    base = _measure_base(job, run, session, sink, stop)
    trainer = Trainer(session, job.prepared, job.recipe, run.checkpoints, identity, stop)
    with MetricsFile(run.metrics) as metrics:
        if saved is not None:
            trainer.restore(saved)
            metrics.truncate_after(saved.state.step)
        elif job.recipe.lora.start_from:
            start_from(session, Path(job.recipe.lora.start_from), lora_spec(job.recipe))
        for event in trainer.events():
            metrics.handle(event)
            sink(event)
    assert trainer.best is not None  # the validation before the first step is always a best one
    session.set_state(TrainState(trainer.state.best_step, trainer.best, {}))
    save_adapter(job, run, trainer.best, session.scheme, trainer.state.best_step)
    tuned = job.measure(session, job.prepared.held_out, "tuned model", sink, stop)
    save_evaluation(run.evaluation("tuned"), tuned)
    report = build_report(job, run, session, trainer, base, tuned)
    write_report(run, report)
    return report


def build_report(
    job: Job, run: RunFolder, session: Session, trainer: Trainer, base: Evaluation | None, tuned: Evaluation
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
        held_out=f"{len(job.prepared.held_out.examples)} {kind} rows",
        base=base,
        tuned=tuned,
        comparison=compare(base, tuned) if base else None,
        overfitting=overfitting_verdict(validations),
        validations=validations,
        best_step=trainer.state.best_step,
    )


def _checkpoint_of(run: RunFolder, identity: Mapping[str, Any], sink: Sink) -> checkpoints.Checkpoint | None:
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


def check_base(adapter: Path, model: Path) -> None:
    """Raises Incompatible when the adapter folder was trained on other base weights than `model` has."""
    facts = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("finetune", {})
    if facts.get("base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise Incompatible(f"{adapter} was trained on other base weights than those in {model}; give the same base")


def save_adapter(job: Job, run: RunFolder, tensors: Mapping[str, FloatArray], scheme: str, step: int) -> None:
    """The adapter folder, whole or absent, with the tokenizer and template it was trained with."""
    base = job.recipe.model.path if not job.recipe.model.path.startswith("builtin:") else str(job.model)
    config = read_config(job.model)
    blocks = int((config.get("text_config") or config)["num_hidden_layers"])
    facts = {"base_fingerprint": fingerprint(job.model), "scheme": scheme, "step": step,
             "template": job.prepared.template, "prompt": job.recipe.prompt.model_dump(mode="json")}
    with new_folder(run.adapter) as folder:
        write_adapter(folder, tensors, lora_spec(job.recipe), base, blocks, facts)
        job.tokenizer.save_pretrained(folder)


def identity_of(job: Job) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint, key by key."""
    recipe = {f"{key}": value for key, value in _flat(job.recipe.model_dump(mode="json")) if key not in _NOT_IDENTITY}
    digest = hashlib.sha256()
    for dataset in (job.prepared.train, job.prepared.valid):
        for example in dataset.examples:
            digest.update(example.tokens.tobytes() + example.weights.tobytes())
    return {"base_model_weights": fingerprint(job.model), "training_and_validation_rows": digest.hexdigest()} | recipe


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def account_of(prepared: Prepared) -> dict[str, Any]:
    """What became of every row, for people and for JSON."""

    def split(dataset: Dataset | None) -> dict[str, Any] | None:
        if dataset is None:
            return None
        lengths = sorted(len(one.tokens) for one in dataset.examples)
        return {
            "rows": dataset.rows,
            "used": len(dataset.examples),
            "tokens": sum(lengths),
            "supervised_tokens": int(sum(one.weights.sum() for one in dataset.examples)),
            "median_length": lengths[len(lengths) // 2] if lengths else 0,
            "longest": lengths[-1] if lengths else 0,
            "shortened": list(dataset.shortened),
            "dropped": [list(one) for one in dataset.dropped],
            "notes": list(dataset.notes),
        }

    return {
        "task": prepared.task,
        "format": prepared.format,
        "template": prepared.template,
        "labels": list(prepared.labels),
        "train": split(prepared.train),
        "valid": split(prepared.valid),
        "test": split(prepared.test),
    }


