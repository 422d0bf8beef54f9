"""Finds a language model's blocks among the tensors of a folder, and the linear layers that can be adapted.

A folder may hold more stacks of blocks: vision and audio towers, and heads that predict several tokens. None of
these is adapted, nor counted as blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from backends.usual_families import OTHER_MODEL

Shapes = Mapping[str, tuple[int, ...]]
_IN_BLOCK = re.compile(r"^(?P<stack>(?:.*?\.)?layers\.)(?P<block>\d+)\.(?P<within>.+)\.weight$")
_NOT_ADAPTED = re.compile(r"\bexperts\b|\brouter\b|(^|\.)gate$|norm")  # experts are chosen by token, not by layer
_EXPERTS = re.compile(r"layers\.\d+\..*(\bexperts\b|\bswitch_mlp\b|block_sparse_moe\.\w+_linear)(?!.*(bias|_?scales)$)")
_KEYS_AND_VALUES = re.compile(r"\b(k_proj|v_proj)$")
_LANGUAGE = re.compile(r"language_model|text_model|decoder")


def stack_of(shapes: Shapes, vocabulary: int | None) -> str:
    """What the names of the language model's blocks begin with, up to their number: "model.layers.".

    Of several stacks it is the one beside an embedding of tokens, and else the one that is named so or has the most
    blocks. "" where there is none.
    """
    counts: dict[str, int] = {}
    for name in shapes:
        if match := _IN_BLOCK.match(name):
            counts[match["stack"]] = max(counts.get(match["stack"], 0), int(match["block"]) + 1)
    if len(counts) < 2:
        return next(iter(counts), "")
    return max(
        counts, key=lambda stack: (_has_embedding(stack, shapes, vocabulary), _is_named_so(stack), counts[stack])
    )


def layers_of(shapes: Shapes, stack: str, text: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The linear layers to adapt -> (block, name within it), of the blocks that a text config counts.

    Blocks beyond `num_hidden_layers` predict further tokens; keys and values of the last `num_kv_shared_layers` are
    those of earlier blocks, whatever weights stand in the file.
    """
    blocks, shared = text.get("num_hidden_layers"), text.get("num_kv_shared_layers")
    known = blocks if type(blocks) is int else None
    own = known - shared if known is not None and type(shared) is int else None
    layers: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        match = _IN_BLOCK.match(name)
        if match is None or match["stack"] != stack or len(shape) != 2 or _NOT_ADAPTED.search(match["within"]):
            continue
        block = int(match["block"])
        if known is not None and block >= known:
            continue
        if own is not None and block >= own > 0 and _KEYS_AND_VALUES.search(match["within"]):
            continue
        layers[name.removesuffix(".weight")] = block, match["within"]
    return layers


def expert_numbers(shapes: Shapes) -> int:
    """How many weights the experts of all blocks have, packed ones (MXFP4, two in a byte) unpacked."""
    experts = {name: shape for name, shape in shapes.items() if _EXPERTS.search(name) and len(shape) > 1}
    return sum(prod(shape) * (2 if name.endswith("_blocks") else 1) for name, shape in experts.items())


def text_only(shapes: Shapes, stack: str) -> dict[str, tuple[int, ...]]:
    """The tensors of the part of the model that has the blocks, and of its head."""
    model = stack.removesuffix("layers.")
    return {n: shape for n, shape in shapes.items() if n.startswith(model) or "lm_head" in n or n.count(".") < 2}


def parts_beside(shapes: Shapes, stack: str) -> list[str]:
    """The parts of a checkpoint that are not of its language model: "vision_tower", "mtp"."""
    beside = (name.removeprefix("model.") for name in {*shapes} - {*text_only(shapes, stack)})
    return sorted({name.split(".")[0] for name in beside})


def no_layers(shapes: Shapes) -> str:
    """Why a model without a linear layer to adapt has none, with the remedy."""
    if any(re.search(r"\bc_attn\.weight$", name) for name in shapes):
        return f"GPT-2 keeps its layers in another form (Conv1D), which is not adapted here; {OTHER_MODEL}"
    numbered = next((match[1] for name in shapes if (match := re.match(r"(.*?\.)\d+\.", name))), None)
    if numbered and not any(_IN_BLOCK.match(name) for name in shapes):
        return f"its blocks are called {numbered}N, and only those called layers.N are adapted here; {OTHER_MODEL}"
    return f"no linear layer in its blocks; {OTHER_MODEL}"


def ending(module: str) -> str:
    """The name from the blocks on, which all libraries share: "layers.0.mlp.up_proj"."""
    match = _IN_BLOCK.match(f"{module}.weight")
    return module if match is None else f"layers.{match['block']}.{match['within']}"


def _has_embedding(stack: str, shapes: Shapes, vocabulary: int | None) -> bool:
    before = stack.removesuffix("layers.")
    beside = (shape for name, shape in shapes.items() if re.fullmatch(rf"{re.escape(before)}\w+\.weight", name))
    return any(len(shape) == 2 and shape[0] >= (vocabulary or 1) for shape in beside)


def _is_named_so(stack: str) -> bool:
    return _LANGUAGE.search(stack) is not None
