"""The longest max_length and the largest model that fit in a machine's memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from backends.interface import LoraSpec, Modules
from backends.memory_plan import Architecture, Costs, Micro, footprint
from finetune.training.budget import LEAST, Workload
from finetune.training.sampled_steps import largest_micro

STEP = 8  # tokens; batches are padded to so many
# The models that configs/ names, from their config.json: blocks, hidden, inner, queries, keys, vocabulary, tied.
MODELS = {
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 2048, 1024, 151936, True),
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 2048, 1024, 151936, True),
    "Qwen/Qwen3-4B-Instruct-2507": (36, 2560, 9728, 4096, 1024, 151936, True),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": (34, 4096, 14336, 4096, 1024, 131072, False),
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": (40, 5120, 16384, 4096, 1024, 131072, False),
}


def longest_row(work: Workload, costs: Costs, memory: float, positions: int) -> int:
    """Tokens of the longest row that fits alone in a step; 0: none does. positions: the most that the model takes."""
    supervised = max(int(np.count_nonzero(example.weights[1:])) for example in work.examples)
    low, high = 0, positions // STEP  # in steps
    while low < high:
        middle = (low + high + 1) // 2
        micro = Micro(1, middle * STEP, min(middle * STEP, supervised))
        needed = footprint(work.architecture, work.model, work.lora, work.adapted, micro, costs, work.averaged)
        low, high = (middle, high) if needed.peak <= memory else (low, middle - 1)
    return low * STEP


def largest_model(work: Workload, costs: Costs, memory: float) -> str | None:
    """The name of the largest of MODELS that fits with the recipe's rows and adapter; None: none does."""
    micro = largest_micro(work.examples, work.batch_size, work.seed, LEAST)
    fitting = None
    for name, sizes in MODELS.items():
        shape = architecture_of(*sizes)
        adapted = _adapted(shape, work.lora)
        if footprint(shape, work.model, work.lora, adapted, micro, costs, work.averaged).peak <= memory:
            fitting = name
    return fitting


def architecture_of(
    blocks: int, hidden: int, inner: int, queries: int, keys: int, vocabulary: int, tied: bool
) -> Architecture:
    """Of a model of the Llama kind whose files hold 16 bits for each weight."""
    block = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    modules = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    shape = Architecture(
        blocks, hidden, inner, queries, keys, vocabulary, modules, vocabulary * hidden * (2 - tied), 0, 2, False
    )
    embedding = 0 if tied else vocabulary * hidden
    return replace(shape, stored=2 * (shape.linear + shape.other), embedding=embedding)


def _adapted(shape: Architecture, lora: LoraSpec) -> Modules:
    first = 0 if lora.layers is None else shape.blocks - lora.layers
    named = {
        name: size
        for name, size in shape.modules.items()
        if int(name.split(".")[2]) >= first and (not lora.targets or name.rsplit(".", 1)[-1] in lora.targets)
    }
    return named or shape.modules  # targets of another family
