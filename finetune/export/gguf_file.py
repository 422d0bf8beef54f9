"""GGUF files: a whole model, or an adapter alone. One tensor at a time is in memory.

Which tensor gets which type follows llama-quantize.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.disk.model_writer import Tensors, cast
from finetune.errors import EnvironmentProblem
from finetune.export.families import Family, Keys, family_of
from finetune.export.merge import Held
from finetune.export.packages import optional
from finetune.export.vocabulary import vocabulary
from finetune.launch import processors

FACTORS = "rope_freqs.weight"
Types = Mapping[str, tuple[tuple[int, ...], str]]  # tensor of the file -> shape, type
# kind -> the type of most matrices, of those that matter most, and llama.cpp's number for the mixture
KINDS: dict[str, tuple[str, str, int]] = {
    "f32": ("F32", "F32", 0),
    "f16": ("F16", "F16", 1),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q6_k": ("Q6_K", "Q6_K", 18),
    "q5_k_m": ("Q5_K", "Q6_K", 17),
    "q4_k_m": ("Q4_K", "Q6_K", 15),
}
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "F16", "Q5_0": "F16", "Q5_1": "F16"}
_QKV = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROWS = 1 << 20  # numbers that one thread packs at a time


def write_model(file: Path, folder: ModelFolder, tensors: Tensors, template: str, kind: str) -> int:
    """Writes every tensor of the model. tensors: by their names in the checkpoint.

    Returns how many matrices have rows too narrow for the type, and so are in a larger one. folder: of the base.
    template: the chat template that travels. kind: of `KINDS`. Raises EnvironmentProblem for a model or a tokenizer
    that cannot be written exactly.
    """
    family = family_of(folder)
    shapes = {} if family.factors is None else {FACTORS: family.factors.shape}
    for name, written in family.names.items():
        shape = folder.whole_shapes[name]
        shapes[written] = (shape[0], shape[2]) if len(shape) == 3 else shape  # as `Family.converted` makes it
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
    types = {name: (shape, chosen[name][0]) for name, shape in shapes.items()}
    _write(file, family.architecture, keys, types, of_file(family, tensors))
    return sum(narrow for _, narrow in chosen.values())


def of_file(family: Family, tensors: Tensors) -> Tensors:
    """The model's tensors under the file's names, as it holds them."""

    def converted(name: str) -> FloatArray:
        return family.converted(name, tensors[name]())

    factors = {} if family.factors is None else {FACTORS: partial(np.asarray, family.factors)}
    return factors | {written: partial(converted, name) for name, written in family.names.items()}


def write_adapter(
    file: Path, folder: ModelFolder, tensors: Mapping[str, FloatArray], alpha: float, kind: str = "f16"
) -> Tensors:
    """Writes an adapter for the GGUF file of its base; its tensors under the file's names, as it holds them.

    tensors: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r]. kind: f32, f16 or bf16.
    """
    family = family_of(folder)
    written: dict[str, FloatArray] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".")
        target, second = f"{module}.weight", factor == "lora_B"
        written[f"{family.names[target]}.{factor.lower()}"] = family.converted(target, tensor) if second else tensor
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    types = {name: (tensor.shape, KINDS[kind][0]) for name, tensor in written.items()}
    factors = {name: partial(np.asarray, tensor) for name, tensor in written.items()}
    _write(file, family.architecture, keys | {"general.file_type": KINDS[kind][2]}, types, factors)
    return factors


def _write(file: Path, architecture: str, keys: Keys, types: Types, tensors: Tensors) -> None:
    gguf = optional("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    try:
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in keys.items():
            adds.get(type(value), writer.add_array)(key, value)
        for name, (shape, kind) in types.items():
            number = gguf.GGMLQuantizationType[kind]
            size = prod(gguf.quants.quant_shape_to_byte_shape(shape, number))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind) in types.items():
            writer.write_tensor_data(packed(np.asarray(tensors[name](), np.float32), kind, name))
    finally:
        writer.close()


def tensors_of(file: Path) -> Held:
    """Each tensor's type, and how its numbers are read."""
    gguf = optional("gguf")

    def read(tensor: Any) -> FloatArray:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shaped: FloatArray = numbers.reshape(tensor.shape.tolist()[::-1])
        return shaped

    return {one.name: (one.tensor_type.name, partial(read, one)) for one in gguf.GGUFReader(file).tensors}


def type_of(name: str, shape: Sequence[int], kind: str, blocks: int, head: str) -> tuple[str, bool]:
    """The type of a tensor, by its name in the file, and whether its rows were too narrow for the wanted one.

    head: the tensor that gives the logits, "output.weight" or, where it is tied, "token_embd.weight".
    """
    if len(shape) < 2 or name.endswith(".shortconv.conv.weight"):  # llama.cpp convolves with no other
        return "F32", False
    wanted, better, _ = KINDS[kind]
    match = _IN_BLOCK.fullmatch(name)
    if name == head or (match and match[2] in ("attn_v", "ffn_down") and _more_bits(int(match[1]), blocks)):
        wanted = better
    elif match and match[2] == "attn_qkv" and wanted != better:
        wanted = _QKV[wanted]
    sizes = {one.name: count for one, (count, _) in optional("gguf").GGML_QUANT_SIZES.items()}  # numbers in a pack
    chosen = wanted
    if name == head and chosen.endswith("_K") and shape[-1] % sizes[chosen]:
        chosen = "Q8_0"
    while shape[-1] % sizes[chosen]:
        chosen = _NARROWER[chosen]
    return chosen, chosen != wanted


def _more_bits(block: int, blocks: int) -> bool:
    """llama-quantize: the first and the last eighth of the blocks, and every third between them."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def packed(tensor: FloatArray, kind: str, name: str) -> NDArray[Any]:
    """The numbers as the file holds them. Raises EnvironmentProblem, which names the tensor, where they do not fit."""
    if not np.isfinite(tensor).all():
        raise EnvironmentProblem(f"{name} holds numbers that are not finite; no file was written")
    if kind in ("F32", "F16", "BF16"):
        return cast(tensor, kind.lower(), name)
    gguf = optional("gguf")
    number = gguf.GGMLQuantizationType[kind]
    pack = gguf.quants.quantize
    if kind.endswith("_K"):  # numpy packs no such; the library frees the interpreter while it works
        pack = optional("libgguf").quantize_rows
    parts = np.array_split(tensor, max(1, min(len(tensor), tensor.size // _ROWS)))
    with ThreadPoolExecutor(processors()) as pool:
        return np.concatenate(list(pool.map(lambda part: pack(part, int(number)), parts)))
