"""GGUF files: a whole model, or an adapter alone. One tensor at a time is in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.errors import Incompatible
from finetune.export.families import Family, family_of
from finetune.export.gguf_types import KINDS, packed, packed_bytes, type_of
from finetune.export.packages import optional
from finetune.export.rotary import Keys
from finetune.export.vocabulary import vocabulary


@dataclass(frozen=True)
class Written:
    """What a file holds."""

    types: Mapping[str, int]  # type -> how many tensors
    narrow: int  # matrices whose rows are no multiple of 256 (32) numbers, written in a larger type than asked for


Plan = dict[str, tuple[tuple[int, ...], str]]  # tensor of the file -> shape, type


def write_model(
    file: Path, folder: ModelFolder, tensors: Iterable[tuple[str, FloatArray]], template: str, kind: str
) -> Written:
    """Writes every tensor of the model, which come by their names in the checkpoint, in any order.

    folder: of the base. template: the chat template that travels. kind: of `KINDS`. Raises EnvironmentProblem for a
    model or a tokenizer that cannot be written exactly, Incompatible where tensors are missing or not the model's.
    """
    family = family_of(folder)
    shapes = {written: _shape(folder, name) for name, written in family.names.items()}
    if family.factors is not None:
        shapes["rope_freqs.weight"] = family.factors.shape
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    blocks = family.keys[f"{family.architecture}.block_count"]
    chosen = {name: type_of(name, shape, kind, blocks, head) for name, shape in shapes.items()}
    plan = {name: (shape, chosen[name][0]) for name, shape in shapes.items()}
    keys = {
        "general.type": "model",
        "general.name": family.architecture.rstrip("0123456789"),  # llama.cpp reads meaning into some names
        "general.file_type": KINDS[kind][2],
        "general.quantization_version": 2,
        **family.keys,
        **vocabulary(folder, template),
    }
    _write(file, family.architecture, keys, plan, _converted(family, tensors))
    return Written(Counter(kind for _, kind in plan.values()), sum(narrow for _, narrow in chosen.values()))


def write_adapter(
    file: Path, folder: ModelFolder, tensors: Mapping[str, FloatArray], alpha: float, kind: str = "f16"
) -> Written:
    """Writes an adapter for the GGUF file of its base.

    tensors: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r]. kind: f32, f16 or bf16.
    """
    family = family_of(folder)
    written: dict[str, FloatArray] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".")
        target = f"{module}.weight"
        if target not in family.names:
            raise Incompatible(f"{file}: the model has no layer {module:.120}, which the adapter changes")
        second = factor == "lora_B"
        written[f"{family.names[target]}.{factor.lower()}"] = family.converted(target, tensor) if second else tensor
    plan = {name: (tensor.shape, KINDS[kind][0]) for name, tensor in written.items()}
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    keys["general.file_type"] = KINDS[kind][2]
    _write(file, family.architecture, keys, plan, written.items())
    return Written(Counter(kind for _, kind in plan.values()), 0)


def _shape(folder: ModelFolder, name: str) -> tuple[int, ...]:
    """The shape of a tensor as the model multiplies with it; MLX packs several numbers of a row into one."""
    shape, module = folder.shapes[name], name.removesuffix(".weight")
    groups = folder.shapes.get(f"{module}.scales")
    if groups is None:
        return tuple(shape)
    settings: dict[str, Any] = folder.config.get("quantization") or {}
    special = settings.get(module)
    size = special.get("group_size") if isinstance(special, dict) else None
    return (shape[0], groups[1] * int(size or settings.get("group_size", 64)))


def _converted(family: Family, tensors: Iterable[tuple[str, FloatArray]]) -> Iterator[tuple[str, FloatArray]]:
    if family.factors is not None:
        yield "rope_freqs.weight", family.factors
    for name, tensor in tensors:
        if name in family.names:
            yield family.names[name], family.converted(name, tensor)


def _write(file: Path, architecture: str, keys: Keys, plan: Plan, tensors: Iterable[tuple[str, FloatArray]]) -> None:
    gguf = optional("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        for name, (shape, kind) in plan.items():
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), packed_bytes(shape, kind), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_numbers(writer.fout[0], int(writer.data_alignment), plan, tensors, file)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adds.get(type(value), writer.add_array)(key, value)


def _write_numbers(
    opened: Any, alignment: int, plan: Plan, tensors: Iterable[tuple[str, FloatArray]], file: Path
) -> None:
    """Each tensor at its place, which the header has said; so they may come in any order."""
    places, end = {}, -(-opened.tell() // alignment) * alignment
    for name, (shape, kind) in plan.items():
        places[name] = end
        end += -(-packed_bytes(shape, kind) // alignment) * alignment
    opened.truncate(end)
    for name, tensor in tensors:
        if name not in places or tensor.shape != plan[name][0]:
            raise Incompatible(f"{file}: {name} has the shape {list(tensor.shape)}, and not that of the model's config")
        numbers = np.ascontiguousarray(packed(np.asarray(tensor, np.float32), plan[name][1], name))
        opened.seek(places.pop(name))
        opened.write(numbers.reshape(-1).view(np.uint8).data)
    if places:
        raise Incompatible(f"{file}: {len(places)} tensors of the model are missing, the first is {next(iter(places))}")
