"""A recipe made ready: the backend chosen, the model found, the data prepared. No model is loaded yet."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backends import registry
from backends.interface import BackendError, Session
from backends.model_folder import ModelFolder
from finetune.data.clock import now
from finetune.data.label_names import Labels
from finetune.data.prepare import prepare
from finetune.data.problems import refuse, refuse_rows
from finetune.data.rows import Prepared, Row, Rows, Split
from finetune.data.tokenizer import Tokenizer, load_tokenizer, stop_tokens
from finetune.data.unanswered import unanswered
from finetune.disk.held_out import REMEDY, read_held_out
from finetune.disk.identity import check_held_out, check_model, clock_of
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible, RecipeError
from finetune.evaluation.evaluate import Evaluation
from finetune.events import Progress
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec


@dataclass(frozen=True)
class Setup:
    """A recipe whose model is found and checked, with its tokenizer: what every command but `init` begins with."""

    recipe: Recipe
    folder: ModelFolder
    tokenizer: Tokenizer

    def session(self, backend: str) -> Session:
        """The live session; heavy from here on. Raises Incompatible where the model's files changed meanwhile."""
        model, lora, optim = model_spec(self.recipe, self.folder), lora_spec(self.recipe), optim_spec(self.recipe)
        try:
            return registry.open_session(backend, model, lora, optim, self.recipe.seed)
        except Exception:
            self.check_model()
            raise

    def check_model(self) -> None:
        """Raises Incompatible where a file of the model is no longer as it was when the model was found."""
        if file := self.folder.changed():
            raise Incompatible(
                f"{file}: changed, replaced or deleted while the model was in use; nothing more is written. Put back "
                "the model that the run began with"
            )


@dataclass(frozen=True)
class Job(Setup):
    """Everything a run needs before its model is loaded."""

    backend: str
    prepared: Prepared

    def open(self) -> Session:
        """The live session; heavy from here on."""
        return self.session(self.backend)


def find_folder(recipe: Recipe) -> ModelFolder:
    """The recipe's model folder, read and checked. Raises RecipeError, EnvironmentProblem or BackendError."""
    return ModelFolder.open(model_folder(recipe.model), recipe.model.remote_code)


def set_up(recipe: Recipe, run: Path | None = None) -> Setup:
    """The recipe's model folder and its tokenizer. Raises as `find_folder` does.

    run: a run that exists. Raises Incompatible where its model was another, before anything is made of this one.
    """
    folder = find_folder(recipe)
    if run is not None:
        check_model(run, folder)
    return Setup(recipe, folder, load_tokenizer(folder))


def refuse_unused_accelerator(recipe: Recipe) -> None:
    """Raises BackendError where training would take many times as long as on the card that is in the machine."""
    backend = registry.choose(recipe.backend)
    if unused := registry.unused_accelerator(backend, recipe.device):
        raise BackendError(f"{backend}: {unused}; or train on the processor all the same: device=cpu")


def making_ready(
    recipe: Recipe, backend: str | None = None, run: Path | None = None, labels: Labels | None = None
) -> Generator[Progress, None, Job]:
    """Check the backend, find the model, read and prepare the data. No model is loaded.

    run: one that exists; chat templates write its time, and not today's. The job's recipe names the format and the task
    that were recognised, so that later commands need not look again. labels: that run's, to measure rows of data.test
    alone.
    Raises DataError for rows that stop training, Incompatible for tokens that the model lacks or as `set_up` does.
    """
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run)
    clock = now() if run is None else clock_of(run)
    prepared = yield from prepare(recipe, setup.tokenizer, base=None, clock=clock, labels=labels)
    refuse(prepared, recipe)
    _check_vocabulary(setup, prepared)
    _check_positions(setup, prepared)
    data = recipe.data.model_copy(update={"format": prepared.format})
    recipe = recipe.model_copy(update={"data": data, "task": prepared.task})
    return Job(recipe=recipe, folder=setup.folder, tokenizer=setup.tokenizer, backend=chosen, prepared=prepared)


def ready_to_answer(
    recipe: Recipe, backend: str | None, run: RunFolder, source: Rows
) -> Generator[Progress, None, tuple[Job, list[Row]]]:
    """Rows as a run's model is asked them, in `test`, and the row of each. Raises as `making_ready` does.

    Every row that cannot be asked is a bad one, which `data.on_error` leaves out.
    """
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run.path)
    account = run.account()
    labels, always = (tuple(account.labels), account.always) if account else ((), None)
    clock = clock_of(run.path)
    prepared, rows = yield from unanswered(recipe, setup.tokenizer, source, labels, always, clock)
    left_out = [*prepared.held_out.left_out, *prepared.held_out.too_long]
    if recipe.data.on_error == "stop" or not rows:
        refuse_rows(left_out)
    _check_vocabulary(setup, prepared)
    _check_positions(setup, prepared)
    return Job(recipe, setup.folder, setup.tokenizer, chosen, prepared), rows


def measured_again(recipe: Recipe, backend: str | None, run: RunFolder) -> Job | None:
    """The rows that a run measured, as it has recorded them: no file of rows is read. None where it has recorded none.

    Raises Incompatible where they are not what the run wrote, and as `set_up` does.
    """
    recorded = read_held_out(run)
    if recorded is None:
        return None
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run.path)
    split = recorded.split
    if recipe.task == "auto" or recipe.data.format == "auto":
        raise ValueError("the recipe of a run names its task and its format")
    prepared = Prepared(
        task=recipe.task,
        format=recipe.data.format,
        template=recipe.prompt.template,
        train=Split("train", 0),
        valid=split if split.name == "valid" else Split("valid", 0),
        test=split if split.name == "test" else None,
        labels=recorded.labels,
        label_tokens=recorded.label_tokens,
        stop_tokens=stop_tokens(setup.tokenizer),
    )
    check_held_out(run.path, prepared, f"{run.held_out.name} was changed: {REMEDY}")
    _check_vocabulary(setup, prepared)
    return Job(recipe=recipe, folder=setup.folder, tokenizer=setup.tokenizer, backend=chosen, prepared=prepared)


def known_validation(job: Job, base: Evaluation | None) -> Evaluation | None:
    """The validation before the first step, where the base's evaluation is of the same model and the same rows.

    A resumed run reads the same figures from evaluation-base.json. A validation writes no answers.
    """
    if base is None or job.prepared.held_out is not job.prepared.valid or job.recipe.lora.start_from:
        return None
    return base if job.prepared.task == "classification" else replace(base, accuracy=None)


def _check_vocabulary(setup: Setup, prepared: Prepared) -> None:
    """Raises Incompatible for tokens that the model lacks: a backend would fail, or read beyond its weights."""
    known = setup.folder.vocabulary
    if known is None:
        return
    for example in (example for split in prepared.splits for example in split.examples):
        if (highest := int(np.max(example.tokens))) >= known:
            text = setup.tokenizer.convert_ids_to_tokens(highest)
            raise Incompatible(
                f"{example.location}: the token {text!r} is number {highest}, and the model in {setup.folder.path} has "
                f"{known}. A vocabulary is never enlarged here: give the model its own tokenizer, or enlarge it "
                "first (resize_token_embeddings of transformers)"
            )


def _check_positions(setup: Setup, prepared: Prepared) -> None:
    """Raises RecipeError for rows longer than the positions that the model has learned: it fails beyond them."""
    known = setup.folder.positions if setup.folder.weights else None
    if known is None:
        return
    for example in (example for split in prepared.splits for example in split.examples):
        if len(example) > known:
            raise RecipeError(
                f"{example.location}: {len(example):,} tokens, and the model in {setup.folder.path} has {known:,} "
                f"positions; set train.max_length: {known}"
            )
    asked = setup.recipe.evaluate
    if prepared.task != "generation" or not asked.generate:
        return
    longest = max((len(example.prompt_tokens) for example in prepared.held_out.examples), default=0)
    if longest + asked.max_tokens > known:
        raise RecipeError(
            f"evaluate.max_tokens: {asked.max_tokens}, after a prompt of {longest:,} tokens, and the model in "
            f"{setup.folder.path} has {known:,} positions; lower it, or set evaluate.generate: false"
        )
