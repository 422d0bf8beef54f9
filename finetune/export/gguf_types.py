"""Number types of a GGUF file: which tensor gets which, by the rule of llama-quantize, and the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import FloatArray
from finetune.errors import EnvironmentProblem
from finetune.export.packages import optional, processors
from finetune.export.weights import cast

# kind -> the type of most matrices, of those that matter most (None: the same), and llama.cpp's number for the mixture
KINDS: dict[str, tuple[str, str | None, int]] = {
    "f32": ("F32", None, 0),
    "f16": ("F16", None, 1),
    "bf16": ("BF16", None, 32),
    "q8_0": ("Q8_0", None, 7),
    "q6_k": ("Q6_K", None, 18),
    "q5_k_m": ("Q5_K", "Q6_K", 17),
    "q4_k_m": ("Q4_K", "Q6_K", 15),
}
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "F16", "Q5_0": "F16", "Q5_1": "F16"}
_QKV = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROWS = 1 << 20  # numbers that one thread packs at a time


def type_of(name: str, shape: Sequence[int], kind: str, blocks: int, head: str) -> tuple[str, bool]:
    """The type of a tensor, by its name in the file, and whether its rows were too narrow for the wanted one.

    head: the tensor that gives the logits, "output.weight" or, where it is tied, "token_embd.weight".
    """
    usual, better, _ = KINDS[kind]
    if len(shape) < 2 or name.endswith(".shortconv.conv.weight"):  # llama.cpp convolves with no other
        return "F32", False
    wanted = usual
    if better:
        match = _IN_BLOCK.fullmatch(name)
        if name == head or (match and match[2] in ("attn_v", "ffn_down") and _more_bits(int(match[1]), blocks)):
            wanted = better
        elif match and match[2] == "attn_qkv":
            wanted = _QKV[usual]
    chosen = wanted
    if chosen != "Q8_0" and name == head and "_K" in chosen and shape[-1] % _sizes(chosen)[0]:
        chosen = "Q8_0"
    while shape[-1] % _sizes(chosen)[0]:
        chosen = _NARROWER[chosen]
    return chosen, chosen != wanted


def _more_bits(block: int, blocks: int) -> bool:
    """llama-quantize: the first and the last eighth of the blocks, and every third between them."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _sizes(kind: str) -> tuple[int, int]:
    """How many numbers of a row are packed together, and into how many bytes."""
    gguf = optional("gguf")
    count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(count), int(size)


def packed_bytes(shape: Sequence[int], kind: str) -> int:
    count, size = _sizes(kind)
    return prod(shape) // count * size


def packed(tensor: FloatArray, kind: str, name: str) -> NDArray[Any]:
    """The numbers as the file holds them. Raises EnvironmentProblem, which names the tensor, where they do not fit."""
    if not np.isfinite(tensor).all():
        raise EnvironmentProblem(f"{name} holds numbers that are not finite; no file was written")
    if kind in ("F32", "F16", "BF16"):
        return cast(tensor, kind.lower(), name)  # type: ignore[arg-type]
    gguf = optional("gguf")
    number = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        return _packed_by_threads(tensor, int(number))
    numbers: NDArray[Any] = gguf.quants.quantize(tensor, number)
    return numbers


def _packed_by_threads(tensor: FloatArray, number: int) -> NDArray[Any]:
    """Types that numpy does not pack; the library frees the interpreter while it works."""
    pack = optional("libgguf", ", or use --type q8_0, which does not need it").quantize_rows
    parts = np.array_split(tensor, max(1, min(len(tensor), tensor.size // _ROWS)))
    with ThreadPoolExecutor(processors()) as pool:
        return np.concatenate(list(pool.map(lambda part: pack(part, number), parts)))
