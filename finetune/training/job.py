"""A prepared recipe: backend chosen, model located, data prepared. The model is not loaded yet."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from backends import registry
from backends.interface import BackendError, Session, TrainState
from backends.model_folder import ModelFolder
from finetune.data.grouped_split import WORDS
from finetune.data.label_names import Labels
from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.rows import Prepared
from finetune.data.template_clock import now
from finetune.data.tokenizer import Tokenizer, load_tokenizer
from finetune.disk.adapter import Adapter, check_there
from finetune.disk.identity import check_model, clock_of, parting_of
from finetune.errors import DataError, Incompatible, RecipeError
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.suite import Suite
from finetune.events import Progress
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec, with_classes
from finetune.supervisor import announce_model, reading
from finetune.training.budget import has_to_stream


@dataclass(frozen=True)
class Setup:
    """A recipe whose model is found and checked, with its tokenizer: what every command but `init` begins with."""

    recipe: Recipe
    folder: ModelFolder
    tokenizer: Tokenizer
    streamed: bool | None = field(default=None, kw_only=True)  # whether the model is; None: where it has to be

    def session(self, backend: str, adapter: Adapter | None = None) -> Session:
        """The live session, with `adapter` in it if one is given; heavy from here on.

        Raises Incompatible where the model's files changed meanwhile.
        """
        streamed = has_to_stream(self.recipe, self.folder, backend) if self.streamed is None else self.streamed
        session = open_model(self.recipe, self.folder, backend, streamed)
        if adapter is not None:
            session.set_state(TrainState(0, adapter.tensors, {}))
        return session

    def check_backend(self, backend: str) -> None:
        """Raises BackendError for what the backend cannot do with this model, before data are read or it is loaded."""
        registry.check_model(backend, model_spec(self.recipe, self.folder), lora_spec(self.recipe))

    def check_model(self) -> None:
        """Raises Incompatible where a file of the model is no longer as it was when the model was found."""
        _check_unchanged(self.folder)


def open_model(recipe: Recipe, folder: ModelFolder, backend: str, streamed: bool = False) -> Session:
    """The live session; heavy from here on. Raises Incompatible where the model's files changed meanwhile."""
    model, lora, optim = model_spec(recipe, folder, streamed), lora_spec(recipe), optim_spec(recipe)
    announce_model(folder.path)
    try:
        with reading(str(folder.path)):
            return registry.open_session(backend, model, lora, optim, recipe.seed)
    except Exception:
        _check_unchanged(folder)
        raise


def _check_unchanged(folder: ModelFolder) -> None:
    if file := folder.changed():
        raise Incompatible(
            f"{file}: changed, replaced or deleted while the model was in use; nothing more is written. Put back "
            "the model that the run began with"
        )


@dataclass(frozen=True)
class Job(Setup):
    """Everything a run needs before its model is loaded."""

    backend: str
    prepared: Prepared
    suite: Suite | None = None  # the cases that both models are asked at the end

    def open(self, adapter: Adapter | None = None) -> Session:
        """The live session, with `adapter` in it if one is given; heavy from here on."""
        return self.session(self.backend, adapter)


def find_folder(recipe: Recipe, trained: bool = False) -> ModelFolder:
    """The recipe's model folder, read and checked. Raises RecipeError, EnvironmentProblem or BackendError.

    A model that cannot be trained here is refused before its weights are downloaded, where its config tells.
    trained: it was, by a run that exists, and may be used on another backend than the recipe's.
    """
    code = recipe.model.remote_code

    def refuse_untrainable(path: Path) -> None:
        if not trained:
            registry.check_config(recipe.backend, path, code)

    return ModelFolder.open(model_folder(recipe.model, refuse_untrainable), code)


def set_up(recipe: Recipe, run: Path | None = None) -> Setup:
    """The recipe's model folder and its tokenizer. Raises as `find_folder` does.

    run: a run that exists. Raises Incompatible where its model was another, before anything is made of this one.
    Of a new one also DataError where the adapter to start from is not there.
    """
    folder = find_folder(recipe, trained=run is not None)
    if run is not None:
        check_model(run, folder)
    elif recipe.lora.start_from:
        check_there(Path(recipe.lora.start_from))
    with reading(str(folder.path / "tokenizer.json")):
        return Setup(recipe, folder, load_tokenizer(folder))


def refuse_head(recipe: Recipe, command: str) -> None:
    """Raises RecipeError for a command that needs text of a model that has a head instead."""
    if recipe.head is not None:
        raise RecipeError(
            f"{command}: this run's model chooses a label with its head and writes no text; label rows with "
            "`finetune predict RUN FILE`, or load its adapter folder, whose README.md says how"
        )


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
    setup.check_backend(chosen)
    clock = now() if run is None else clock_of(run)
    parting = WORDS if run is None else parting_of(run)
    with reading(f"{recipe.data.train} with {setup.folder.path / 'tokenizer.json'}"):
        prepared = yield from prepare(recipe, setup.tokenizer, None, clock, labels, parting)
    refuse(prepared, recipe)
    refuse_unfit(setup, prepared)
    known = recognised(recipe, prepared)
    return Job(recipe=known, folder=setup.folder, tokenizer=setup.tokenizer, backend=chosen, prepared=prepared)


def recognised(recipe: Recipe, prepared: Prepared) -> Recipe:
    """The recipe with the format and the task that its rows were found to have."""
    data = recipe.data.model_copy(update={"format": prepared.format})
    return with_classes(recipe.model_copy(update={"data": data, "task": prepared.task}), prepared.labels)


def refuse_unfit(setup: Setup, prepared: Prepared) -> None:
    """Raises Incompatible for tokens that the model lacks, RecipeError for rows or answers longer than it can take."""
    _check_vocabulary(setup, prepared)
    _check_positions(setup, prepared)


def beyond_context(folder: ModelFolder, prepared: Prepared) -> str | None:
    """What a person should know of rows longer than the context that the model was trained with; None: there are none.

    Computed positions have no end, and so such rows can be trained on.
    """
    context = folder.context if folder.weights else None
    lengths = [len(example) for split in prepared.splits for example in split.examples]
    long = sum(length > context for length in lengths) if context else 0
    if not long:
        return None
    return (
        f"{long:,} row{'s' * (long > 1)} longer than the {context:,} tokens of the model's context: "
        f"what lies beyond is new to it; to stay within what config.json says, set train.max_length: {context}"
    )


def room_for_answer(setup: Setup, prompt: int, most: int) -> int:
    """Tokens that an answer after `prompt` tokens may have: `most`, or what the model's positions leave of them.

    Raises DataError for a prompt that leaves none.
    """
    known = setup.folder.positions if setup.folder.weights else None
    if known is None:
        return most
    if prompt >= known:
        where = setup.folder.path
        raise DataError(
            f"the prompt has {prompt:,} tokens, and the model in {where} has {known:,} positions; shorten it"
        )
    return min(most, known - prompt)


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


def known_validation(job: Job, base: Evaluation | None) -> Evaluation | None:
    """The validation before the first step, where the base's evaluation is of the same model and the same rows.

    A resumed run reads the same figures from evaluation-base.json. A validation writes no answers.
    """
    if base is None or job.prepared.held_out is not job.prepared.valid or job.recipe.lora.start_from:
        return None
    return base if job.prepared.task in ("classification", "preference") else replace(base, accuracy=None)
