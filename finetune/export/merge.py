"""The tuned model as one: each weight of the base with the adapter's product added, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray, LoraSpec, Session
from backends.model_folder import ModelFolder, read_object
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.disk.adapter import Adapter
from finetune.disk.safetensors_file import read_tensor
from finetune.errors import EnvironmentProblem, Incompatible
from finetune.export.weights import KINDS, Kind, write_weights

_QUANTISED = ("quantization", "quantization_config")  # of config.json


def tensors(
    session: Session, folder: ModelFolder, adapter: Adapter, original: bool = False
) -> Iterator[tuple[str, FloatArray]]:
    """Every tensor of the merged model under its name in the checkpoint, as float32, one at a time.

    What was quantised for training is taken as the session multiplies with it: that is what the adapter was trained on.
    original: take the weights of the files all the same, for a model that is quantised again on the same grid, where
    the rounding would undo the tuning. Raises Incompatible where the adapter has a layer that the model lacks.
    """
    plain = original or session.scheme == "none"
    held = folder.packed if plain else folder.packed | set(folder.lora_modules(LoraSpec(1, 1.0)))
    waiting = {name.rpartition(".")[0] for name in adapter.tensors}
    for file, shapes in folder.weights.items():
        for name in (name for name in shapes if name in folder.whole_shapes):
            module, _, part = name.rpartition(".")
            whole = session.base_weight(module) if part == "weight" and module in held else _read(file, name)
            if part == "weight" and module in waiting:
                waiting.remove(module)
                whole = merged(whole, adapter, module)
            yield name, whole
    if waiting:
        raise Incompatible(f"{folder.path} has no weight of {', '.join(sorted(waiting))}, which the adapter is for")


def merged(weight: FloatArray, adapter: Adapter, module: str) -> FloatArray:
    """weight + scale * B @ A in float64, rounded once. [out, in]"""
    a, b = (adapter.tensors[f"{module}.lora_{part}"].astype(np.float64) for part in "AB")
    total: FloatArray = (weight + adapter.scale * (b @ a)).astype(np.float32)
    return total


def _read(file: Path, name: str) -> FloatArray:
    try:
        return read_tensor(file, name)
    except ValueError as error:
        raise EnvironmentProblem(
            f"{file}: {error}, and only float32, float16 and bfloat16 are exported; train on a model in one of these"
        ) from None


def write_merged(
    to: Path, session: Session, folder: ModelFolder, adapter: Adapter, kind: Kind, original: bool = False
) -> None:
    """The weights and config.json of the merged model into the folder `to`, which exists."""
    write_weights(to, folder.whole_shapes, tensors(session, folder, adapter, original), kind)
    # Both spellings of the rotary settings: transformers 5 writes `rope_parameters`, other readers know the older keys.
    config = {key: value for key, value in folder.config.items() if key not in (*_QUANTISED, "_name_or_path")}
    _write_json(to / "config.json", config | {"dtype": KINDS[kind], "torch_dtype": KINDS[kind]})
    if folder.remote_code:
        for file in folder.path.glob("*.py"):
            shutil.copyfile(file, to / file.name)


def write_tokenizer(to: Path, folder: ModelFolder, tokenizer: Tokenizer, template: str) -> None:
    """The tokenizer with this chat template, where new and old readers look for it, and what ends an answer."""
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        tokenizer.save_pretrained(to)
    finally:
        tokenizer.chat_template = own
    settings = to / "tokenizer_config.json"
    _write_json(settings, read_object(settings) | {"chat_template": template})
    for file in folder.path.glob("*.model"):  # SentencePiece's own, which some readers want
        shutil.copyfile(file, to / file.name)
    generation = folder.path / "generation_config.json"
    stated = read_object(generation) if generation.exists() else {}
    _write_json(to / "generation_config.json", stated | {"eos_token_id": sorted(stop_tokens(tokenizer))})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
