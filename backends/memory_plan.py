"""Predicted training memory, from tensor shapes and a backend's costs, before anything is loaded.

Sizes are in bytes. The working memory follows from the widest intermediate results of the arithmetic that all
backends share; what a backend adds to that, and what it saves for the backward pass, is in its `Costs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from backends.config_sizes import number_of, recurrence_of
from backends.interface import LoraSpec, ModelSpec, Modules
from backends.memory import available_bytes
from backends.micro_batches import few_widths
from backends.model_folder import ModelFolder
from backends.predictions import NOTHING, Architecture, Costs, Elementwise, Machine, Size
from backends.text_blocks import expert_numbers
from backends.weight_plan import streamed_bytes, weight_bytes

__all__ = [
    "NOTHING",
    "Architecture",
    "Costs",
    "Elementwise",
    "Footprint",
    "Machine",
    "Micro",
    "available_bytes",
    "first_adapted",
    "footprint",
    "kept_states_bytes",
    "read_architecture",
    "trained_numbers",
    "weight_bytes",
]


@dataclass(frozen=True)
class Micro:
    """The micro-batch that needs the most memory."""

    rows: int
    width: int  # tokens, padding counted
    supervised: int  # positions in all its rows

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Footprint:
    """The peak is the larger of two phases. Writing a checkpoint copies less than an update does."""

    runtime: float  # Python, libraries, driver
    weights: float
    adapter: float  # A and B, or nothing where the weights train; two moments, the gradient, the best of what trains
    activations: float  # saved for the backward pass
    working: float  # beside them, for a moment: a block's or the head's intermediate results, or the update's
    loading: float  # beside the weights while they are loaded: pages of the files, and one weight in float32

    @property
    def step(self) -> float:
        """What a step takes and gives back."""
        return self.activations + self.working

    @property
    def training(self) -> float:
        return self.runtime + self.weights + self.adapter + self.step

    @property
    def peak(self) -> float:
        return max(self.training, self.runtime + self.weights + self.loading)


def read_architecture(folder: ModelFolder) -> Architecture:
    """Raises BackendError where the folder has no weights, or no linear layers in its blocks."""
    modules = folder.lora_modules(LoraSpec(1, 1.0))
    text, shapes = folder.text_config, folder.text_shapes
    tied = bool(text.get("tie_word_embeddings", folder.config.get("tie_word_embeddings", False)))
    sizes = {name: prod(shape) for name, shape in shapes.items() if not (tied and name.endswith("lm_head.weight"))}
    embedding = next((shape for name, shape in shapes.items() if "embed" in name and len(shape) == 2), (1, 1))
    heads = number_of(text, "num_attention_heads", 1)
    hidden = number_of(text, "hidden_size", embedding[1])
    head = number_of(text, "head_dim", hidden // heads)
    stored = sum(file.stat().st_size for file in folder.weights)
    quantised = any(name.endswith((".scales", ".weight.absmax")) for name in shapes)
    experts, packed = expert_numbers(shapes), any(name.endswith("_blocks") for name in shapes)
    inside = 0 if packed else experts  # of `sizes`, which count bytes of packed ones
    sizes = {name: size for name, size in sizes.items() if not name.endswith(("_blocks", "_scales"))}
    return Architecture(
        blocks=number_of(text, "num_hidden_layers", 1),
        hidden=hidden,
        inner=number_of(text, "intermediate_size", max(out for out, _ in modules.values())),
        queries=heads * head,
        keys=number_of(text, "num_key_value_heads", heads) * head,
        vocabulary=number_of(text, "vocab_size", embedding[0]),
        modules=modules,
        other=0 if quantised else sum(sizes.values()) - sum(map(prod, modules.values())) - inside,
        stored=stored,
        stored_number=4 if stored > 3 * sum(map(prod, folder.shapes.values())) else 2,
        quantised=quantised,
        head_norms=any(name.endswith(".q_norm.weight") for name in shapes),
        norms_after=any(name.endswith(".post_feedforward_layernorm.weight") for name in shapes),
        experts=experts,
        experts_packed=packed,
        heads=heads,
        scores="sinks" if text.get("model_type") == "gpt_oss" else "softcap" * bool(text.get("attn_logit_softcapping")),
        recurrence=recurrence_of(text),
        embedding=0 if tied else prod(embedding),
    )


def footprint(
    architecture: Architecture,
    model: ModelSpec,
    lora: LoraSpec,
    adapted: Modules,
    micro: Micro,
    costs: Costs,
    averaged: bool = False,
) -> Footprint:
    """Of training `adapted` with micro-batches no larger than `micro`, with the backend and device of `costs`.

    averaged: whether an average over the steps is kept.
    """
    number = model.number_bytes(costs.device)
    trainable = trained_numbers(architecture, lora, adapted)
    micro = _at_once(micro, costs)
    held = costs.whole_held if lora.whole and costs.whole_held else costs.held
    activations = held * _activations(architecture, model, lora, adapted, micro, costs)
    block = _block_working(architecture, micro, number, costs) + _unpacked(architecture, model, number, costs)
    if lora.dora:  # a weight as float32, for the lengths of its rows
        block += 4.0 * max(map(prod, adapted.values()))
    if architecture.scores in costs.scores:  # gradients of the weights of every pair, before and after the softmax
        of_pair = number if architecture.scores else 4  # torch's plain products are in float32
        block += 3.0 * of_pair * architecture.heads * micro.width * micro.tokens
    if architecture.recurrence:
        block = max(block, costs.recurrent_working(architecture.recurrence, micro.tokens))
    headed = replace(architecture, vocabulary=lora.classes or architecture.vocabulary)
    working = held * max(block, _head_working(headed, micro, number, costs))
    updating = costs.update * trainable
    if lora.whole:
        updating = costs.whole_update * trainable + costs.widest_update * _widest(architecture)
    parks = model.checkpointing and costs.parked_inputs is not None
    parked = architecture.embedding * float(number) if parks and not model.streamed else 0.0
    whole = weights = weight_bytes(architecture, model.quantize, number, costs)
    if model.streamed:
        weights = streamed_bytes(architecture, model.quantize, number, costs, first_adapted(adapted))
    return Footprint(
        runtime=_runtime(model, micro, number, costs),
        weights=weights - parked,
        # four or five times float32
        adapter=((16.0 if lora.whole else 20.0) + costs.average * averaged) * trainable,
        activations=activations,
        # the update begins when activations are gone
        working=max(working + costs.whole_sum * trainable * lora.whole, updating - activations),
        loading=_loading(architecture, model, number, costs) * weights / whole,
    )


def trained_numbers(architecture: Architecture, lora: LoraSpec, adapted: Modules) -> int:
    """How many numbers train."""
    if lora.whole:
        return architecture.linear + architecture.experts + architecture.other
    return lora.trainable(adapted) + lora.classes * architecture.hidden


def kept_states_bytes(tokens: int, hidden: int, number: int) -> int:
    """Of the temporary file with the hidden states that frozen blocks give: `tokens` of all rows, each counted up to
    its last supervised position."""
    return tokens * hidden * number


def first_adapted(adapted: Modules) -> int:
    """The first block that has an adapter."""
    return min(map(_block, adapted))


def _runtime(model: ModelSpec, micro: Micro, number: int, costs: Costs) -> float:
    four_bit = costs.four_bit_runtime if model.quantize == "4bit" else 0.0
    return costs.runtime + four_bit + (costs.bfloat16_products * micro.tokens if number == 2 else 0.0)


def _activations(
    architecture: Architecture, model: ModelSpec, lora: LoraSpec, adapted: Modules, micro: Micro, costs: Costs
) -> float:
    """What the backward pass needs. With recomputation: every adapted block's input, and all of a few blocks."""
    number, blocks = model.number_bytes(costs.device), len(set(map(_block, adapted)))
    if costs.expands_keys and model.dtype == "float16":
        architecture = replace(architecture, keys=architecture.queries)
    saved = _saved(architecture, adapted, lora, number, micro, costs) * micro.tokens
    if lora.dora:  # what its rows' lengths are multiplied with
        saved += sum(out for out, _ in adapted.values()) / blocks * number * micro.tokens
    if not model.checkpointing:
        return blocks * saved
    inputs = blocks if costs.parked_inputs is None else min(blocks, costs.parked_inputs)
    return inputs * architecture.hidden * number * micro.tokens + costs.recomputed_blocks * saved


def _saved(
    architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int, micro: Micro, costs: Costs
) -> float:
    """Of one token and block, the mean of all kinds of blocks."""
    recurrence, blocks = architecture.recurrence, architecture.blocks
    share = 1 - recurrence.blocks / blocks if recurrence else 1.0  # of the blocks that attend to keys
    queries, keys = (round(share * width) for width in (architecture.queries, architecture.keys))
    scores = costs.scores.get(architecture.scores, Size()).bytes(number) * architecture.heads * micro.width
    recurrent = (1 - share) * costs.recurrent(recurrence, number) if recurrence else 0.0
    return (
        costs.saved(replace(architecture, queries=queries, keys=keys), adapted, lora, number)
        + share * scores
        + recurrent
    )


def _block_working(architecture: Architecture, micro: Micro, number: int, costs: Costs) -> float:
    """Of the backward pass through a gated layer: gradients of gate and up, of their product, and of its input."""
    return (costs.gated_working * architecture.inner + 6.0 * architecture.hidden) * number * micro.tokens


def _unpacked(architecture: Architecture, model: ModelSpec, number: int, costs: Costs) -> float:
    """The widest 4-bit weight as numbers."""
    if model.quantize != "4bit" and not architecture.quantised:
        return 0.0
    return max(map(prod, architecture.modules.values())) * costs.unpacked_weight.bytes(number)


def _head_working(architecture: Architecture, micro: Micro, number: int, costs: Costs) -> float:
    """Logits and their gradients in float32, some positions at a time; the states of all, with their gradients."""
    logits = costs.logits_at_once or micro.supervised * architecture.vocabulary
    rows = min(micro.supervised, max(logits // architecture.vocabulary, 1))
    states = 2.0 * micro.supervised * architecture.hidden * number
    return rows * architecture.vocabulary * (8.0 + (4.0 if number == 2 else 0.0)) + states


def _loading(architecture: Architecture, model: ModelSpec, number: int, costs: Costs) -> float:
    widest = _widest(architecture)
    if model.quantize == "none" and architecture.stored_number == number:
        return 0.0
    if not costs.maps_files or architecture.quantised:
        return float(widest * architecture.stored_number)
    return architecture.stored + (costs.quantising * widest if model.quantize == "4bit" else 0.0)


def _widest(architecture: Architecture) -> int:
    """Numbers of the widest weight."""
    return max(architecture.vocabulary * architecture.hidden, *map(prod, architecture.modules.values()))


def _at_once(micro: Micro, costs: Costs) -> Micro:
    """The part of it that is computed at a time, as wide as it is then."""
    tokens = costs.tokens_at_once or micro.tokens
    rows = min(micro.rows, max(tokens // micro.width, 1))
    width = few_widths(micro.width) if costs.few_widths else micro.width
    return Micro(rows, width, -(-micro.supervised * rows // micro.rows))


def _block(module: str) -> int:
    return int(module.partition("layers.")[2].partition(".")[0])
