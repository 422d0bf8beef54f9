"""A recipe made ready: the backend chosen, the model found, the data prepared. No model is loaded yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import Session
from backends.model_folder import ModelFolder
from finetune.data.prepare import prepare
from finetune.data.rows import Dataset, Prepared
from finetune.data.tokenizer import Tokenizer, load_tokenizer
from finetune.errors import Diverged, Incompatible
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.events import Sink, reporter
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
        """The live session; heavy from here on."""
        model, lora, optim = model_spec(self.recipe, self.folder), lora_spec(self.recipe), optim_spec(self.recipe)
        return registry.open_session(backend, model, lora, optim, self.recipe.seed)

    def decode(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class Job(Setup):
    """Everything a run needs before its model is loaded."""

    backend: str
    prepared: Prepared

    def open(self) -> Session:
        return self.session(self.backend)

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
            path = self.folder.path
            raise Diverged(f"{what}: its loss on the held-out rows is {found.loss}; look at the weights: {path}")
        return found


def find_folder(recipe: Recipe) -> ModelFolder:
    """The recipe's model folder, read and checked. Raises RecipeError, EnvironmentProblem or BackendError."""
    return ModelFolder.open(model_folder(recipe.model), recipe.model.remote_code)


def set_up(recipe: Recipe) -> Setup:
    """The recipe's model folder and its tokenizer. Raises as `find_folder` does."""
    folder = find_folder(recipe)
    return Setup(recipe, folder, load_tokenizer(folder))


def load_job(recipe: Recipe, backend: str | None = None) -> Job:
    """Check the backend, find the model, read and prepare the data. No model is loaded.

    The job's recipe names the format and the task that were recognised, so that later commands need not look again.
    """
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe)
    prepared = prepare(recipe, setup.tokenizer, base=Path.cwd())
    _check_vocabulary(setup, prepared)
    data = recipe.data.model_copy(update={"format": prepared.format})
    recipe = recipe.model_copy(update={"data": data, "task": prepared.task})
    return Job(recipe, setup.folder, setup.tokenizer, chosen, prepared)


def _check_vocabulary(setup: Setup, prepared: Prepared) -> None:
    """Raises Incompatible for tokens that the model lacks: a backend would fail, or read beyond its weights."""
    known = setup.folder.vocabulary
    if known is None:
        return
    for split in (prepared.train, prepared.valid, prepared.test):
        for example in split.examples if split else ():
            if (most := int(example.tokens.max())) >= known:
                text = setup.tokenizer.convert_ids_to_tokens(most)
                raise Incompatible(
                    f"{example.place}: the token {text!r} is number {most}, and the model in {setup.folder.path} has "
                    f"{known}. A vocabulary is never enlarged here: give the model its own tokenizer, or enlarge it "
                    "first (resize_token_embeddings of transformers)"
                )
