"""A recipe made ready: the backend chosen, the model found, the data prepared. No model is loaded yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import Session
from backends.model_folder import vocabulary_of
from finetune.data.prepare import prepare
from finetune.data.rows import Prepared
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import Incompatible
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec


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
