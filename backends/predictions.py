"""Inputs of the memory and time predictions: architectures, backend costs, well-known machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, Protocol

from backends.interface import Device, LoraSpec, Modules, NumberType, Wanted

# Shortcuts that several backends have, in the words of `Session.shortcuts`.
SHARED_PREFIXES = "shared prefixes"
FROZEN_BLOCKS = "frozen blocks computed once"
HEAD = "head at supervised positions"
LORA = "own LoRA gradient"
ATTENTION = "attention in tiles"
DELTA_RULE = "gated delta rule in chunks"


class Recurrence(NamedTuple):
    """The blocks whose attention is a gated delta rule, with a state instead of keys and values."""

    blocks: int
    heads: int  # of values
    key_heads: int
    keys: int  # width of one head's keys
    values: int  # width of one head's values


@dataclass(frozen=True)
class Architecture:
    """What memory and time depend on in a model."""

    blocks: int
    hidden: int
    inner: int  # width of the gated layer
    queries: int  # width of all queries
    keys: int  # width of all keys
    vocabulary: int
    modules: Modules  # every linear layer of the blocks
    other: int  # weights outside of them: embedding, norms, a separate output layer
    stored: int  # bytes of the files
    stored_number: int  # bytes of one weight in the files
    quantised: bool  # already in the files
    head_norms: bool = False  # whether queries and keys are normed (Qwen3)
    norms_after: bool = False  # whether what attention and the gated layer make is normed too (Gemma, OLMo)
    experts: int = 0  # weights of experts, which are chosen token by token and not adapted
    experts_packed: bool = False  # in the files, in MXFP4
    heads: int = 1  # of queries
    scores: str = ""  # what keeps attention from being computed in pieces: "softcap", "sinks"; "": nothing
    recurrence: Recurrence | None = None
    embedding: int = 0  # weights of one that is not the output layer too; counted in `other`

    @property
    def widths(self) -> int:
        """Numbers of one token that go into the linear layers of all blocks, and that come out of them."""
        return sum(out + inputs for out, inputs in self.modules.values())

    @property
    def linear(self) -> int:
        return sum(out * inputs for out, inputs in self.modules.values())


class Size(NamedTuple):
    """Of something whose size depends on the type in which the model computes: so many bytes and so many numbers."""

    fixed: float = 0.0
    numbers: float = 0.0

    def bytes(self, number: int) -> float:
        return self.fixed + self.numbers * number


class Elementwise(NamedTuple):
    """Of what is not a product, in one forward pass: norms, activations, rotations, softmax."""

    number: float = 0.0  # for each number that goes into a linear layer or comes out of one
    score: float = 0.0  # for each query and key of a head
    logit: float = 0.0  # for each logit
    weight: float = 0.0  # for each weight of a linear layer, whose rows are laid out anew for the product


A_NUMBER = Size(numbers=1.0)
NOTHING = Elementwise()
MXFP4 = 0.5 + 1 / 32  # bytes of a weight: 4 bits, and a scale of 8 bits for 32 weights


@dataclass(frozen=True)
class Costs:
    """What a backend needs on one kind of device. All figures are in bytes, unless they say otherwise."""

    device: Device
    runtime: float  # before a model is loaded; CPU: Python and all libraries; GPU: the driver's own memory
    # what the backward pass needs of one token and block: (architecture, adapted modules, lora, bytes of a number)
    saved: Callable[[Architecture, Modules, LoraSpec, int], float]
    reached: float  # the share of the rate of matrix products that a step reaches
    # seconds that starting one layer's forward pass takes: a GPU's host does it beside the products, a CPU before
    host: float = 0.0
    four_bit_host: float = 1.0  # times `host`: the start of a layer in 4 bits
    unpacking: float = 0.0  # operations of products that take as long as to unpack one 4-bit weight
    masking: float = 0.0  # and as to make one number of dropout's mask, and to apply it
    elementwise: Elementwise = NOTHING  # seconds that one thread takes, whatever the others do
    spread: Elementwise = NOTHING  # operations of products that take as long: what all threads share
    held: float = 1.1  # bytes that the allocator holds per byte in use
    update: float = 20.0  # per number of the adapter: an update makes weights, moments and their quotient anew
    # the same where the whole model trains, beside the weights, both moments, the gradient and the best weights
    whole_update: float = 12.0
    widest_update: float = 0.0  # and of each number of the widest weight, which is updated in pieces that exist at once
    whole_sum: float = 0.0  # where the whole model trains, per number: a micro-batch's gradient beside the sum of all
    whole_held: float | None = None  # `held` there, if it is another
    tokens_at_once: int | None = None  # computed at a time; None: the whole micro-batch
    few_widths: bool = False  # whether long rows are padded a little more, so that fewer widths occur (`few_widths`)
    logits_at_once: int | None = None  # numbers computed at a time; None: those of all supervised positions
    gated_working: float = 4.0  # widths of a gated layer that exist at once in its backward pass, beside what is saved
    recomputed_blocks: float = 1.0  # whose saved results exist at once where activations are recomputed
    # inputs of blocks computed again that are on the device at once; the others, and an embedding that is not the head
    # too, are in the machine's memory; None: nothing is
    parked_inputs: int | None = None
    four_bit: str | None = None  # the scheme in words; None: it has none
    four_bit_runtime: float = 0.0  # what the library for it adds to `runtime`
    four_bit_weight: Size = A_NUMBER  # one weight, with its share of the scales
    unpacked_weight: Size = A_NUMBER  # one weight of the 4-bit layer that is being multiplied
    bfloat16_products: float = 0.0  # per token computed at a time, held by the library after products in bfloat16
    streams: bool = False  # whether frozen blocks can be read from the disk where the model does not fit
    packs_experts: bool = False  # whether experts are in 4 bits too; otherwise they are unpacked where files pack them
    expands_keys: bool = False  # whether float16 means a card whose attention wants keys for every query head
    # kept of each pair of query and key, head and block, by `Architecture.scores`: what is not computed in pieces
    scores: Mapping[str, Size] = field(default_factory=dict)
    # kept of one token in a block with a recurrence, in the place of queries and keys: (recurrence, bytes of a number)
    recurrent: Callable[[Recurrence, int], float] = lambda recurrence, number: 0.0
    recurrent_working: Callable[[Recurrence, int], float] = lambda recurrence, tokens: 0.0  # beside it, for so many
    maps_files: bool = False  # whether the files' pages stay in memory while weights are cast or quantised
    quantising: float = 0.0  # per weight of the layer that is being quantised
    average: float = 4.0  # per number that trains: an average over the steps, where the recipe asks for one


def cuda_libraries() -> float:
    """Bytes that the libraries of a torch built for CUDA add to a process, on a CPU too. Loads none of them."""
    spec = PathFinder.find_spec("torch")  # also where a plan lets no torch be found
    built = spec is not None and spec.origin is not None and Path(spec.origin).with_name("lib") / "libtorch_cuda.so"
    return 310e6 if built and built.exists() else 0.0


@dataclass(frozen=True)
class Machine:
    """A machine that is not at hand. The rate is its maker's figure for matrix products; it was not measured."""

    name: str
    memory: float  # bytes of the device that a process can use
    rate: float  # floating-point operations per second, in 16 bits
    source: str


class Predictions(Protocol):
    """What a backend's `costs` module exports. Importing it loads no framework, and needs none installed."""

    COSTS: Mapping[Device, Costs]  # for each kind of device that it computes on
    MACHINES: tuple[Machine, ...]  # well-known machines that it runs on
    SHORTCUTS: tuple[str, ...]  # all that `Session.shortcuts` may name

    def measured_rate(self, number_type: NumberType, device: Wanted = "auto") -> float:
        """Floating-point operations per second of matrix products here, timed now. Loads the framework."""
