"""A recipe in the terms of the backends: the model, the adapter and the optimiser that it asks for."""

from __future__ import annotations

from backends.interface import LoraSpec, ModelSpec, OptimSpec
from backends.model_folder import ModelFolder
from finetune.recipe.schema import Recipe


def model_spec(recipe: Recipe, folder: ModelFolder) -> ModelSpec:
    return ModelSpec(
        path=folder.path,
        quantize=recipe.quantize,
        dtype=recipe.model.dtype,
        checkpointing=recipe.train.gradient_checkpointing is True,  # auto is settled once the data are known
        device=recipe.device,
        remote_code=folder.remote_code,
        folder=folder,
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
