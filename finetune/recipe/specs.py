"""A recipe in the terms of the backends: the model, the adapter and the optimiser that it asks for."""

from __future__ import annotations

from pathlib import Path

from backends.interface import LoraSpec, ModelSpec, OptimSpec
from finetune.recipe.schema import Recipe


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
