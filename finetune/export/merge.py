"""The tuned model as one: each weight of the base with the adapter's product added, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray, LoraSpec, Session
from backends.model_folder import ModelFolder, read_object
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.disk.adapter import Adapter
from finetune.errors import Incompatible
from finetune.export.weights import KINDS, Kind, Written, read_tensor, write_weights

_TYPE_NAMES = dict(KINDS.values())
_PACKING = (".scales", ".biases")  # of MLX's quantised layers, beside their `.weight`
_QUANTISED = ("quantization", "quantization_config")  # of config.json
_BESIDE = ("*.model",)  # SentencePiece's own file, which some readers want


def tensors(
    session: Session, folder: ModelFolder, adapter: Adapter, original: bool = False
) -> Iterator[tuple[str, FloatArray]]:
    """Every tensor of the merged model under its name in the checkpoint, as float32, one at a time.

    What was quantised for training is taken as the session multiplies with it: that is what the adapter was trained on.
    original: take the weights of the files all the same, for a model that is quantised again on the same grid, where
    the rounding would undo the tuning. Raises Incompatible where the adapter has a layer that the model lacks.
    """
    packed = _packed(folder)
    held = packed if original or session.scheme == "none" else packed | set(folder.lora_modules(LoraSpec(1, 1.0)))
    waiting = {name.rpartition(".")[0] for name in adapter.tensors}
    for file, shapes in folder.weights.items():
        for name in shapes:
            module, _, part = name.rpartition(".")
            if _is_packing(name, packed):
                continue
            whole = session.base_weight(module) if part == "weight" and module in held else read_tensor(file, name)
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


def _packed(folder: ModelFolder) -> set[str]:
    """The layers whose weights stand quantised in the files, by MLX or by bitsandbytes."""
    ends = (".scales", ".weight.absmax")
    return {name.removesuffix(end) for name in folder.shapes for end in ends if name.endswith(end)}


def _is_packing(name: str, packed: set[str]) -> bool:
    """Whether a tensor says how a layer is packed, and is none of the model's own."""
    if ".weight." in name:
        return name.partition(".weight.")[0] in packed
    return name.endswith(_PACKING) and name.rpartition(".")[0] in packed


def names(folder: ModelFolder) -> list[str]:
    """The names of `tensors`."""
    packed = _packed(folder)
    return [name for name in folder.shapes if not _is_packing(name, packed)]


def write_merged(
    to: Path, session: Session, folder: ModelFolder, adapter: Adapter, kind: Kind, original: bool = False
) -> dict[str, Written]:
    """The weights and config.json of the merged model into the folder `to`, which exists."""
    written = write_weights(to, tensors(session, folder, adapter, original), names(folder), kind)
    # Both spellings of the rotary settings: transformers 5 writes `rope_parameters`, other readers know the older keys.
    config = {key: value for key, value in folder.config.items() if key not in (*_QUANTISED, "_name_or_path")}
    _write_json(to / "config.json", config | {"dtype": _TYPE_NAMES[kind], "torch_dtype": _TYPE_NAMES[kind]})
    if folder.remote_code:
        for file in folder.path.glob("*.py"):
            shutil.copyfile(file, to / file.name)
    return written


def write_tokenizer(to: Path, folder: ModelFolder, tokenizer: Tokenizer, template: str) -> None:
    """The tokenizer with this chat template, where new and old readers look for it, and what ends an answer."""
    with _template(tokenizer, template):
        tokenizer.save_pretrained(to)
    settings = to / "tokenizer_config.json"
    _write_json(settings, read_object(settings) | {"chat_template": template})
    for file in (file for pattern in _BESIDE for file in folder.path.glob(pattern)):
        shutil.copyfile(file, to / file.name)
    generation = folder.path / "generation_config.json"
    stated = read_object(generation) if generation.exists() else {}
    _write_json(to / "generation_config.json", stated | {"eos_token_id": sorted(stop_tokens(tokenizer))})


@contextmanager
def _template(tokenizer: Tokenizer, template: str) -> Iterator[None]:
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        yield
    finally:
        tokenizer.chat_template = before


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
