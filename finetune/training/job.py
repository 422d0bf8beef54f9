"""A recipe made ready: the backend chosen, the model found, the data prepared. No model is loaded yet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, Session
from backends.model_folder import fingerprint, read_config, tensor_shapes
from finetune.data.prepare import prepare
from finetune.data.rows import Dataset, Prepared
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import Diverged, Incompatible
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.scoring import Report
from finetune.events import Event, Progress
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Recipe
from finetune.training.loop import Interrupted

Sink = Callable[[Event], None]
# Keys that change where or how fast a run goes, or whose effect the digests of rows and weights already hold.
_NOT_IDENTITY = {
    "output", "backend", "model.path", "model.revision", "model.dtype", "data.train", "data.valid", "data.test",
    "data.max_dropped", "train.micro_tokens", "train.gradient_checkpointing", "evaluate.generate",
    "evaluate.max_tokens", "evaluate.base",
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
            self.backend,
            model_spec(self.recipe, self.model),
            lora_spec(self.recipe),
            optim_spec(self.recipe),
            self.recipe.seed,
        )

    def decode(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def measure(
        self, session: Session, dataset: Dataset, what: str, sink: Sink, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """The same evaluation for every model.

        Raises Interrupted when asked to stop on the way, Diverged where the loss is not a finite number.
        """
        settings = self.recipe.evaluate
        found = evaluate(
            session,
            self.prepared,
            dataset,
            micro_tokens=self.recipe.train.tokens_at_once,
            max_tokens=settings.max_tokens if settings.generate else 0,
            decode=self.decode,
            report=reporter(what, sink, stop),
        )
        if not math.isfinite(found.loss):
            raise Diverged(f"{what}: its loss on the held-out rows is {found.loss}; look at the weights: {self.model}")
        return found


def reporter(what: str, sink: Sink, stop: Callable[[], bool]) -> Report:
    """Progress of an evaluation, to the sink; it raises Interrupted once `stop()` is true."""

    def report(kind: str, done: int, total: int) -> None:
        sink(Progress(0, f"{what}: {kind}", done, total))
        if stop():
            raise Interrupted(f"stopped in the midst of the {what}")

    return report


def load_job(recipe: Recipe, backend: str | None = None) -> Job:
    """Check the backend, find the model, read and prepare the data. No model is loaded.

    The job's recipe names the format and the task that were recognised, so that later commands need not look again.
    """
    chosen = registry.choose(backend or recipe.backend)
    model = model_folder(recipe.model)
    tokenizer = load_tokenizer(model, recipe.model.remote_code)
    prepared = prepare(recipe, tokenizer, base=Path.cwd())
    _check_vocabulary(model, tokenizer, prepared)
    data = recipe.data.model_copy(update={"format": prepared.format})
    recipe = recipe.model_copy(update={"data": data, "task": prepared.task})
    return Job(recipe, chosen, model, tokenizer, prepared)


def vocabulary_of(model: Path) -> int | None:
    """How many tokens the model knows, by its config or else its embeddings; None where neither says."""
    config = read_config(model)
    text = config.get("text_config")
    said = (text if isinstance(text, dict) else config).get("vocab_size")
    if type(said) is int:
        return said
    embeddings = (shape[0] for name, shape in tensor_shapes(model).items() if name.endswith("embed_tokens.weight"))
    return max(embeddings, default=None)


def _check_vocabulary(model: Path, tokenizer: Any, prepared: Prepared) -> None:
    """Raises Incompatible for tokens that the model lacks: a backend would fail, or read beyond its weights."""
    known = vocabulary_of(model)
    if known is None:
        return
    for split in (prepared.train, prepared.valid, prepared.test):
        for example in split.examples if split else ():
            if (most := int(example.tokens.max())) >= known:
                raise Incompatible(
                    f"{example.place}: the token {tokenizer.convert_ids_to_tokens(most)!r} is number {most}, and the "
                    f"model in {model} has {known}. A vocabulary is never enlarged here: give the model its own "
                    "tokenizer, or enlarge it first (resize_token_embeddings of transformers)"
                )


def model_spec(recipe: Recipe, folder: Path) -> ModelSpec:
    return ModelSpec(
        folder,
        recipe.quantize,
        recipe.model.dtype,
        recipe.train.gradient_checkpointing,
        remote_code=recipe.model.remote_code,
    )


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


def identity_of(job: Job) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint, key by key."""
    recipe = {
        f"{key}": value
        for key, value in _flat(job.recipe.model_dump(mode="json", exclude={"data": {"groups"}}))
        if key not in _NOT_IDENTITY
    }
    digest = hashlib.sha256()
    for dataset in (job.prepared.train, job.prepared.valid, job.prepared.test):
        for example in dataset.examples if dataset else ():
            digest.update(example.tokens.tobytes() + example.weights.tobytes())
    return {"base_model_weights": fingerprint(job.model), "data_rows": digest.hexdigest()} | recipe


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
