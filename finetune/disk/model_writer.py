"""Writes a model folder (weights, config, tokenizer) that transformers and mlx-lm load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import FloatArray
from backends.model_folder import NUMBERS, ModelFolder, read_header, read_object, read_tensor
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.disk.safetensors_file import header_bytes
from finetune.errors import EnvironmentProblem

KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # from the finest to the coarsest
Tensors = Mapping[str, Callable[[], FloatArray]]  # name -> what reads or computes it: one at a time is in memory
LARGEST = 4_000_000_000  # bytes of tensors in one file, about
_LARGEST_HALF = float(np.finfo(np.float16).max)
_QUANTISED = ("quantization", "quantization_config")  # of config.json
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def whole_model(folder: ModelFolder, trained: Mapping[str, FloatArray]) -> Tensors:
    """Every tensor of the folder, of those that trained as they are now, in the files' order.

    An output layer that the model takes from its embedding does not train by itself, and may stand in the files.
    """
    embedding = next((tensor for name, tensor in trained.items() if name.endswith(_EMBEDDING)), None)
    whole = folder.whole_shapes if folder.weights else {}
    files = {name: file for file, there in folder.weights.items() for name in there if name in whole}

    def numbers(name: str) -> FloatArray:
        tensor = trained.get(name, embedding if name.endswith(_HEAD) else None)
        return read_numbers(files[name], name) if tensor is None else tensor

    return {name: partial(numbers, name) for name in files}


def check_numbers(folder: ModelFolder) -> None:
    """Raises EnvironmentProblem for a tensor of another kind than is written, before one is read."""
    for file in folder.weights:
        for name, entry in read_header(file)[0].items():
            plain = name in folder.whole_shapes and name.rpartition(".")[0] not in folder.packed
            if plain and entry["dtype"] not in NUMBERS:
                raise _other_numbers(file, f"{name:.200} holds numbers of type {entry['dtype']}")


def read_numbers(file: Path, name: str) -> FloatArray:
    """A tensor of a weight file as float32. Raises EnvironmentProblem for numbers of another kind."""
    try:
        return read_tensor(file, name)
    except ValueError as error:
        raise _other_numbers(file, str(error)) from None


def _other_numbers(file: Path, what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{file}: {what}, and only float32, float16 and bfloat16 are written; train on a model in one of these"
    )


def cast(numbers: FloatArray, kind: str, name: str) -> NDArray[Any]:
    """The numbers in their type, rounded to the nearest; bfloat16 as uint16.

    Raises EnvironmentProblem for numbers beyond float16.
    """
    if kind == "f16" and np.abs(numbers).max(initial=0.0) > _LARGEST_HALF:
        raise EnvironmentProblem(f"{name} holds numbers beyond float16's {_LARGEST_HALF:,.0f}; use --type bf16")
    if kind != "bf16":
        return np.ascontiguousarray(numbers, "<f4" if kind == "f32" else "<f2")
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, kind: str, largest: int = LARGEST
) -> None:
    """`model.safetensors`, or several files of about `largest` bytes and an index.

    shapes: of the tensors.
    """
    *starts, total = accumulate(((4 if kind == "f32" else 2) * prod(shape) for shape in shapes.values()), initial=0)
    files: dict[int, dict[str, tuple[int, ...]]] = {}
    for (name, shape), start in zip(shapes.items(), starts, strict=True):
        files.setdefault(start // largest, {})[name] = shape
    places: dict[str, str] = {}
    for number, part in enumerate(files.values(), 1):
        file = folder / f"model{f'-{number:05d}-of-{len(files):05d}' if len(files) > 1 else ''}.safetensors"
        with file.open("wb") as opened:
            opened.write(header_bytes(part, kind.upper(), {"format": "pt"}))
            for name in part:
                opened.write(cast(tensors[name](), kind, name).data)
        places |= dict.fromkeys(part, file.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


def write_config(to: Path, folder: ModelFolder, kind: str) -> None:
    """config.json, and the Python code that belongs to the model where it may run."""
    # Both spellings of the rotary settings: transformers 5 writes `rope_parameters`, other readers know the older keys.
    config = {key: value for key, value in folder.config.items() if key not in (*_QUANTISED, "_name_or_path")}
    _write_json(to / "config.json", config | {"dtype": KINDS[kind], "torch_dtype": KINDS[kind]})
    if folder.remote_code:
        for file in folder.path.glob("*.py"):
            shutil.copyfile(file, to / file.name)


def write_tokenizer(to: Path, folder: ModelFolder, tokenizer: Tokenizer, template: str | None) -> None:
    """The tokenizer with this chat template, where new and old readers look for it, and what ends an answer."""
    travelling = copy.copy(tokenizer)
    travelling.chat_template = template
    travelling.save_pretrained(to)
    settings = to / "tokenizer_config.json"
    if template is not None:
        _write_json(settings, read_object(settings) | {"chat_template": template})
    for file in folder.path.glob("*.model"):  # SentencePiece's own, which some readers want
        shutil.copyfile(file, to / file.name)
    generation = folder.path / "generation_config.json"
    stated = read_object(generation) if generation.exists() else {}
    _write_json(to / "generation_config.json", stated | {"eos_token_id": sorted(stop_tokens(tokenizer))})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
