"""Recipe to backend specs: model, adapter and optimiser."""

from __future__ import annotations

from collections.abc import Sequence

from backends.interface import LoraSpec, ModelSpec, OptimSpec
from backends.memory_plan import read_architecture, trained_numbers
from backends.model_folder import ModelFolder
from finetune.recipe.schema import Lora, Recipe


def model_spec(recipe: Recipe, folder: ModelFolder, streamed: bool = False) -> ModelSpec:
    return ModelSpec(
        path=folder.path,
        quantize=recipe.quantize,
        dtype="float32" if recipe.method == "full" else recipe.model.dtype,
        checkpointing=recipe.train.gradient_checkpointing is True,  # auto is settled once the data are known
        device=recipe.device,
        remote_code=folder.remote_code,
        streamed=streamed,
        folder=folder,
    )


def with_classes(recipe: Recipe, labels: Sequence[str]) -> Recipe:
    """With the rows' own labels named where a head chooses among them: its size follows from the recipe alone then."""
    if recipe.head is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": list(labels)})})


def lora_spec(recipe: Recipe) -> LoraSpec:
    lora = recipe.lora
    return LoraSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        by_root=lora.rslora,
        dora=lora.dora,
        targets=() if lora.targets == "all" else tuple(lora.targets),
        layers=None if lora.layers == "all" else lora.layers,
        classes=len(recipe.data.labels or ()) if recipe.head else 0,
        whole=recipe.method == "full",
    )


def trainable_numbers(recipe: Recipe, folder: ModelFolder) -> int:
    """In the adapter, and in the head beside it; or in the whole model. Raises BackendError where the model has no such
    layers.
    """
    lora = lora_spec(recipe)
    return trained_numbers(read_architecture(folder), lora, folder.lora_modules(lora))


def scale_in_words(lora: Lora) -> tuple[str, str]:
    """What the adapter's scale is, and its figures."""
    under, number = (f"sqrt({one})" if lora.rslora else str(one) for one in ("rank", lora.rank))
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    return f"adapter scale, alpha / {under}", f"{lora.alpha:g} / {number} = {scale:g}"


def optim_spec(recipe: Recipe) -> OptimSpec:
    return OptimSpec(weight_decay=recipe.train.weight_decay, clip_norm=recipe.train.clip_norm)
