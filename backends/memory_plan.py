"""How much memory training will need, from shapes alone: before anything is loaded, and for machines not at hand.

What is kept for the backward pass is what each backend's code keeps, counted by hand (`_kept`); the working memory
beside it follows from the widest intermediate results. D is the hidden size, I the gated layer's, Q the width of all
queries, K that of all keys, r the rank, e the bytes of an activation; all sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backends.interface import LoraSpec, ModelSpec
from backends.micro_batches import CPU_TOKENS, LOGITS
from backends.model_folder import ModelFolder, trainable_parameters

Device = Literal["cpu", "gpu"]
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, a scale of 8 bits for 64, one of 32 bits for 256 of those
# Python and every library, before a model is loaded, and what the first step still loads: measured with torch 2.13,
# transformers 5.23, MLX 0.32 and Python 3.11 on Linux. On a GPU, the driver's own memory instead: not measured.
_RUNTIME = {"torch": 490e6, "mlx": 410e6, "reference": 490e6}
_FOUR_BIT = {"torch": 50e6}  # bitsandbytes
_PRODUCTS = 1e5  # a token at a time: what oneDNN keeps of its last products in bfloat16, and what lies between them
# What the allocator holds for each byte in use: glibc keeps what lies freed between the tensors that stay (measured:
# 1.4 to 1.6). On a GPU: not measured.
_HELD = {"torch": 1.5, "mlx": 1.05, "reference": 1.1}
_HELD_ON_GPU = 1.1
_DRIVER = {"torch": 450e6, "mlx": 100e6, "reference": 0.0}
# An update makes moments, weights and their quotient anew, so that it is applied whole or not at all: bytes for each
# number of the adapter.
UPDATE = 20.0


@dataclass(frozen=True)
class Architecture:
    """What memory and time depend on."""

    blocks: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    modules: Mapping[str, tuple[int, int]]  # every linear layer of the blocks -> (out, in)
    other: int  # weights outside of them: embedding, norms, an output layer of its own
    stored: int  # bytes of the files
    kept_as: int  # bytes of one weight in the files
    quantised: bool  # in the files already

    @property
    def linear(self) -> int:
        return sum(out * inp for out, inp in self.modules.values())


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
    """Memory in bytes; the peak is the larger of two phases. Writing a checkpoint copies less than an update does."""

    runtime: float  # Python, libraries, driver
    weights: float
    adapter: float  # A and B, two moments, the gradient, the best adapter
    activations: float  # kept for the backward pass
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
    text, shapes = folder.text_config, folder.shapes
    tied = bool(text.get("tie_word_embeddings", folder.config.get("tie_word_embeddings", False)))
    sizes = {name: _size(shape) for name, shape in shapes.items() if not (tied and name.endswith("lm_head.weight"))}
    embedding = next((shape for name, shape in shapes.items() if "embed" in name and len(shape) == 2), (1, 1))
    heads = _number(text, "num_attention_heads", 1)
    hidden = _number(text, "hidden_size", embedding[1])
    head = _number(text, "head_dim", hidden // heads)
    stored = sum(file.stat().st_size for file in folder.weights)
    adapted = sum(out * inp for out, inp in modules.values())
    quantised = any(name.endswith(".scales") for name in shapes)
    return Architecture(
        blocks=_number(text, "num_hidden_layers", 1),
        hidden=hidden,
        inner=_number(text, "intermediate_size", max(out for out, _ in modules.values())),
        queries=heads * head,
        keys=_number(text, "num_key_value_heads", heads) * head,
        vocabulary=_number(text, "vocab_size", embedding[0]),
        modules=modules,
        other=0 if quantised else sum(sizes.values()) - adapted,
        stored=stored,
        kept_as=4 if stored > 3 * sum(sizes.values()) else 2,
        quantised=quantised,
    )


def footprint(
    architecture: Architecture,
    model: ModelSpec,
    lora: LoraSpec,
    adapted: Mapping[str, tuple[int, int]],
    micro: Micro,
    backend: str,
    device: Device,
) -> Footprint:
    """Of training `adapted` (module -> (out, in)) with micro-batches no larger than `micro`."""
    e = 2 if model.dtype == "bfloat16" or (model.dtype == "auto" and device == "gpu") else 4
    micro = _part(micro, CPU_TOKENS.get(backend, micro.tokens)) if device == "cpu" else micro
    count = trainable_parameters(adapted, lora.rank)
    blocks = len({_block(name) for name in adapted})
    kept = _kept(architecture, adapted, lora, e, backend) * micro.tokens
    seen = micro.supervised / micro.tokens if backend != "reference" else 1.0  # of the last block
    whole = (blocks - 1 + seen) * kept
    if model.checkpointing:  # a block's input each, one block's own, and of the last one's what torch still holds
        whole = blocks * architecture.hidden * e * micro.tokens + kept * (2 if backend == "torch" else 1)
    held = _HELD[backend] if device == "cpu" else _HELD_ON_GPU
    recomputed = _working(architecture, micro, e) + _unpacked(architecture, model, e, backend)
    logits = LOGITS.get((backend, device), micro.supervised * architecture.vocabulary)  # at a time
    update = UPDATE * count
    return Footprint(
        runtime=_DRIVER[backend] if device == "gpu" else _libraries(model, micro, e, backend),
        weights=weight_bytes(architecture, model.quantize, e, backend),
        adapter=20.0 * count,
        activations=held * whole,
        working=max(held * max(recomputed, _head(architecture, micro, e, logits)), update - held * whole),
        loading=_loading(architecture, model, e, backend, device),
    )


def _libraries(model: ModelSpec, micro: Micro, e: int, backend: str) -> float:
    four_bit = _FOUR_BIT.get(backend, 0.0) if model.quantize == "4bit" else 0.0
    return _RUNTIME[backend] + four_bit + (_PRODUCTS * micro.tokens if backend == "torch" and e == 2 else 0.0)


def weight_bytes(architecture: Architecture, quantize: str, e: int, backend: str) -> float:
    """Of the frozen weights as they are held."""
    if architecture.quantised:
        return float(architecture.stored)
    packed = e * 1.0
    if quantize == "4bit":
        packed = _NF4 if backend == "torch" else 0.5 + 2 * e / 64  # MLX: a scale and a bias for 64
    return architecture.linear * packed + architecture.other * e


def first_adapted(adapted: Mapping[str, tuple[int, int]]) -> int:
    return min(_block(name) for name in adapted)


def _kept(
    architecture: Architecture, adapted: Mapping[str, tuple[int, int]], lora: LoraSpec, e: int, backend: str
) -> float:
    """What one block keeps of one token: the inputs of its norms and adapted layers, and what attention needs."""
    if backend == "reference":
        return 4.0 * architecture.hidden
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    small = lora.rank * len(leaves)
    if backend == "mlx":  # its tape holds every result, also what the formulas do not need; read off its peak
        sizes = 8 * architecture.hidden + 6 * architecture.queries + 4 * architecture.keys + 3 * architecture.inner
        return float((sizes + small) * e)
    hidden, queries, keys = 2.0, 2.0, 2.0  # the norms' inputs; queries, keys and values, and the attention's result
    hidden += bool(leaves & {"q_proj", "k_proj", "v_proj", "qkv_proj"})
    hidden += bool(leaves & {"gate_proj", "up_proj", "gate_up_proj"})
    inner = 2.0 if "down_proj" in leaves else 3.0  # gate and up; without an adapter also their product's factor
    wide = hidden * architecture.hidden + queries * architecture.queries + keys * architecture.keys
    dropped = sum(inp for _, inp in adapted.values()) / architecture.blocks if lora.dropout else 0.0  # masks: 1 byte
    return (wide + inner * architecture.inner + small) * e + dropped


def _working(architecture: Architecture, micro: Micro, e: int) -> float:
    """Of the backward pass through a gated layer: slopes of gate and up, their product, and that of its input."""
    return (4.0 * architecture.inner + 6.0 * architecture.hidden) * e * micro.tokens


def _unpacked(architecture: Architecture, model: ModelSpec, e: int, backend: str) -> float:
    """The widest 4-bit weight as numbers; bitsandbytes makes indices of 32 bits and float32 of it on the way."""
    if model.quantize != "4bit" and not architecture.quantised:
        return 0.0
    widest = max(out * inp for out, inp in architecture.modules.values())
    return widest * (12.0 if backend == "torch" else float(e))


def _head(architecture: Architecture, micro: Micro, e: int, logits: int) -> float:
    """Logits and their slopes in float32, some positions at a time, and the states of all with their slopes."""
    rows = min(micro.supervised, max(logits // architecture.vocabulary, 1))
    states = 2.0 * micro.supervised * architecture.hidden * e
    return rows * architecture.vocabulary * (8.0 + (4.0 if e == 2 else 0.0)) + states


def _loading(architecture: Architecture, model: ModelSpec, e: int, backend: str, device: Device) -> float:
    widest = max(architecture.vocabulary * architecture.hidden, *(o * i for o, i in architecture.modules.values()))
    same = model.quantize == "none" and architecture.kept_as == e
    if backend == "mlx" or device == "gpu" or same or architecture.quantised:
        return 0.0 if same else widest * float(architecture.kept_as)
    return architecture.stored + (16.0 * widest if model.quantize == "4bit" else 0.0)  # pages of the files, mapped


def _part(micro: Micro, tokens: int) -> Micro:
    """What is computed at once of it."""
    rows = min(micro.rows, max(tokens // micro.width, 1))
    return Micro(rows, micro.width, -(-micro.supervised * rows // micro.rows))


def _block(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size


def _number(config: Mapping[str, Any], key: str, default: int) -> int:
    """Where layers differ, the largest."""
    value = config.get(key)
    if isinstance(value, list):
        value = max(value, default=None)
    return value if isinstance(value, int) and value > 0 else default
