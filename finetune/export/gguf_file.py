"""GGUF files: a whole model, or an adapter alone. One tensor at a time is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
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
from finetune.export.weights import fill

FACTORS = "rope_freqs.weight"
Plan = dict[str, tuple[tuple[int, ...], str]]  # tensor of the file -> shape, type


def write_model(
    file: Path, folder: ModelFolder, tensors: Iterable[tuple[str, FloatArray]], template: str, kind: str
) -> int:
    """Writes every tensor of the model, which come by their names in the checkpoint, in any order.

    Returns how many matrices have rows too narrow for the type, and so are in a larger one. folder: of the base.
    template: the chat template that travels. kind: of `KINDS`. Raises EnvironmentProblem for a model or a tokenizer
    that cannot be written exactly, Incompatible where tensors are missing or not the model's.
    """
    family = family_of(folder)
    shapes = {written: _two_sided(folder.whole_shapes[name]) for name, written in family.names.items()}
    if family.factors is not None:
        shapes[FACTORS] = family.factors.shape
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    blocks = family.keys[f"{family.architecture}.block_count"]
    chosen = {name: type_of(name, shape, kind, blocks, head) for name, shape in shapes.items()}
    keys = {
        "general.type": "model",
        "general.name": family.architecture.rstrip("0123456789"),  # llama.cpp reads meaning into some names
        "general.file_type": KINDS[kind][2],
        "general.quantization_version": 2,
        **family.keys,
        **vocabulary(folder, template),
    }
    plan = {name: (shape, chosen[name][0]) for name, shape in shapes.items()}
    _write(file, family.architecture, keys, plan, of_file(family, tensors))
    return sum(narrow for _, narrow in chosen.values())


def _two_sided(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What `Family.converted` makes of it."""
    return (shape[0], shape[2]) if len(shape) == 3 else tuple(shape)


def of_file(family: Family, tensors: Iterable[tuple[str, FloatArray]]) -> Iterator[tuple[str, FloatArray]]:
    """The model's tensors under the file's names, as it holds them."""
    if family.factors is not None:
        yield FACTORS, family.factors
    for name, tensor in tensors:
        if name in family.names:
            yield family.names[name], family.converted(name, tensor)


def write_adapter(
    file: Path, folder: ModelFolder, tensors: Mapping[str, FloatArray], alpha: float, kind: str = "f16"
) -> dict[str, FloatArray]:
    """Writes an adapter for the GGUF file of its base; its tensors under the file's names, as it holds them.

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
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    keys["general.file_type"] = KINDS[kind][2]
    plan = {name: (tensor.shape, KINDS[kind][0]) for name, tensor in written.items()}
    _write(file, family.architecture, keys, plan, written.items())
    return written


def _write(file: Path, architecture: str, keys: Keys, plan: Plan, tensors: Iterable[tuple[str, FloatArray]]) -> None:
    gguf = optional("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    try:
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in keys.items():
            adds.get(type(value), writer.add_array)(key, value)
        for name, (shape, kind) in plan.items():
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), packed_bytes(shape, kind), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        places, end, step = {}, writer.fout[0].tell(), int(writer.data_alignment)
    finally:
        writer.close()
    for name, (shape, kind) in plan.items():
        start = -(-end // step) * step
        places[name], end = (file, start), start + packed_bytes(shape, kind)
    os.truncate(file, -(-end // step) * step)
    shapes = {name: shape for name, (shape, _) in plan.items()}
    fill(places, shapes, tensors, lambda name, numbers: packed(np.asarray(numbers, np.float32), plan[name][1], name))


def tensors_of(file: Path) -> dict[str, tuple[str, Callable[[], FloatArray]]]:
    """Each tensor's type, and how its numbers are read."""
    gguf = optional("gguf")

    def read(tensor: Any) -> FloatArray:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shaped: FloatArray = numbers.reshape(tensor.shape.tolist()[::-1])
        return shaped

    return {one.name: (one.tensor_type.name, partial(read, one)) for one in gguf.GGUFReader(file).tensors}
