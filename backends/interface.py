"""The boundary: what crosses between the shared code and a backend.

Only numpy arrays, plain numbers and these small frozen types cross it. A backend is two modules: one opens sessions
(`Backend`), the other predicts memory and time without its framework (`predictions.Predictions`). `README.md` here says
how to write them.

B is the number of rows in a micro-batch, T its padded width, r the LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Modules = Mapping[str, tuple[int, int]]  # a linear layer's name -> (out, in)
Device = Literal["cpu", "gpu"]  # the kind of device: all that memory and time depend on
Half = Literal["bfloat16", "float16"]
NumberType = Literal["float32", "bfloat16", "float16"]
Wanted = Literal["auto", "cpu"]  # the device to use: auto is an accelerator where there is one
MAGNITUDE = "magnitude"  # the last part of the name of a tensor that DoRA has beside lora_A and lora_B
HEAD_WEIGHT = "score.weight"  # of a classification head, as transformers calls it in its classes for sequences
PROMPTS_TOGETHER = 32  # the most prompts that `Session.generate` completes side by side
_TOO_LARGE_FOR_FLOAT16 = "gemma"  # in the types of models whose hidden states pass 65,504, float16's end


class BackendError(Exception):
    """The backend, or what was asked of it, cannot be used on this machine. The message says why."""


class Unsupported(BackendError):
    """The backend's library has no such model. The registry adds what to take instead."""


class OutOfMemory(Exception):
    """The device had too little memory for a micro-batch; the session's state is as it was before the call."""


class NonFinite(Exception):
    """A loss or a gradient was NaN or infinite; the step was not applied."""


class Lost(Exception):
    """Another process of the run has ended, or does not answer; the session's state is as it was before the call."""


class IncompatibleState(Exception):
    """Tensors offered to `set_state` do not fit the session; the message lists every difference."""


class CheckedFolder(Protocol):
    """A model folder that was read and checked (`model_folder.ModelFolder`): what a session takes from it."""

    @property
    def path(self) -> Path: ...

    @property
    def remote_code(self) -> bool:
        """Whether Python code that comes with the model may run."""

    @property
    def written(self) -> dict[str, Any]:
        """config.json as it stands."""

    @property
    def config(self) -> dict[str, Any]:
        """The same in the spellings of every library."""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model; the config itself where models are not nested."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape. Raises BackendError where the folder has no weights."""

    @property
    def whole_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the model's own tensors; of packed ones, as they are when they are unpacked."""

    @property
    def stack(self) -> str:
        """What the names of the language model's blocks begin with: "model.layers."."""

    @property
    def weights(self) -> Mapping[Path, Any]:
        """By weight file; empty only in the toys of the reference backend."""

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model knows; None where nothing says it."""

    @property
    def float16_scales(self) -> bool:
        """Whether its weights were quantised with scales in float16; in bfloat16 they would not be the same."""

    def lora_modules(self, lora: LoraSpec) -> dict[str, tuple[int, int]]:
        """Modules to adapt -> (out, in). Raises BackendError where a target names none."""

    def needs_code(self, why: object) -> BackendError:
        """The refusal of a model that comes with code which may not run."""


@dataclass(frozen=True)
class ModelSpec:
    """A model folder with `config.json` and safetensors, and how to hold it."""

    path: Path
    quantize: Literal["none", "4bit"] = "none"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    checkpointing: bool = False  # recompute activations in the backward pass instead of keeping them
    device: Wanted = "auto"
    remote_code: bool = False  # whether Python code that comes with the model may run
    streamed: bool = False  # blocks below the adapter are read from the disk when they compute, and not held
    folder: CheckedFolder | None = field(default=None, compare=False)  # None: the session opens `path`

    def number_type(self, device: Device, half: Half = "bfloat16") -> NumberType:
        """The type of activations, of scales and of weights that are not quantised. auto: float32 on a CPU, elsewhere
        float16 where the folder's scales are, and else `half`.

        half: the type of 16 bits that the device is made for. Where float16 has no room for the model's hidden states
        it is bfloat16, which every device computes, if slowly.
        """
        if self.dtype != "auto":
            return self.dtype
        if device == "cpu":
            return "float32"
        if self.folder is None:
            return half
        if _TOO_LARGE_FOR_FLOAT16 in str(self.folder.text_config.get("model_type", "")):
            return "bfloat16"
        return "float16" if self.folder.float16_scales else half

    def number_bytes(self, device: Device) -> int:
        return 4 if self.number_type(device) == "float32" else 2


@dataclass(frozen=True)
class LoraSpec:
    """What trains: W x + scale * B A x on chosen linear layers (Hu et al., 2021), and a head where there is one; or in
    the place of the adapter every weight of the language model.
    """

    rank: int
    alpha: float
    dropout: float = 0.0  # of the adapter's input, while training
    targets: tuple[str, ...] = ()  # last parts of module names ("q_proj"); empty: every linear in the blocks
    layers: int | None = None  # only the last so many blocks; None: all
    by_root: bool = False  # scale by alpha / sqrt(rank), as rank-stabilised LoRA does (Kalajdzievski, 2023)
    dora: bool = False  # each row of W + scale * B A to a length of its own, which is trained too (Liu et al., 2024)
    classes: int = 0  # of a linear head in the place of the output layer, which is trained too; 0: the output layer
    whole: bool = False  # every weight trains, and there is no adapter: rank and all else but `classes` say nothing

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.by_root else self.rank)

    def trainable(self, modules: Modules) -> int:
        """Numbers in the adapter of `modules`."""
        lengths = sum(out for out, _ in modules.values()) if self.dora else 0
        return self.rank * sum(out + inputs for out, inputs in modules.values()) + lengths


@dataclass(frozen=True)
class OptimSpec:
    """AdamW with bias correction and decoupled decay (Loshchilov & Hutter, 2019); the rate comes with each step."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # of the gradient of all adapter tensors together; None: no clipping


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. Shift and mask are already done.

    Rows may continue tokens that are computed once for all of them: row b then is
    `prefixes[prefix_of[b]]` followed by `inputs[b]`. Nothing in a prefix is supervised.

    What dropout does to a token depends on its row's number and its position in that row, the prefix counted, and not
    on how the step is cut. Tokens with which several rows begin may be of no row: a prefix's are.
    """

    inputs: IntArray  # [B, T]
    targets: IntArray  # [B, T] the token after each input, or with a head its class; any id where the weight is 0
    weights: FloatArray  # [B, T] 0 = prompt or padding
    prefixes: tuple[IntArray, ...] = ()  # [P] each, at least one token
    prefix_of: tuple[int, ...] = ()  # B of them; empty without prefixes
    rows: tuple[int, ...] = ()  # B of them: the rows' numbers in the whole step; empty: numbered as they come
    rowless: tuple[int, ...] = ()  # B of them: how many tokens before and in a row, from its first one, are of no row


@dataclass(frozen=True)
class StepResult:
    loss: float  # sum(weight * nll) / sum(weight) over all micro-batches, before the update
    tokens: int  # supervised positions
    grad_norm: float  # global norm before clipping


@dataclass(frozen=True)
class Scores:
    """What the model thinks of a batch's targets; 0 at positions whose weight is 0."""

    logprob: FloatArray  # [B, T] log p(target), natural logarithm
    greedy: IntArray  # [B, T] the most probable token


@dataclass(frozen=True)
class TrainState:
    """Everything training changes. Names are `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r].

    DoRA has `<module>.magnitude` [out] after them. A head with K classes is HEAD_WEIGHT [K, D], the last of all. Where
    the whole model trains they are its weights instead, by their names and in their layout in the checkpoint.
    """

    step: int  # optimiser steps done
    adapter: Mapping[str, FloatArray]  # what trains
    moments: Mapping[str, FloatArray]  # `<adapter name>.exp_avg` and `.exp_avg_sq`, shaped as the adapter


class Reader(Protocol):
    """A model that is read and not trained: what evaluation needs of one."""

    shares_prefixes: bool  # True: a batch's prefixes are computed once; False: they are repeated for each row

    def score(self, batch: Batch) -> Scores:
        """Dropout off, nothing changed. Raises OutOfMemory, or ValueError for a token that the model does not have."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """A completion for each prompt, without the stop token; greedy at temperature 0.

        Raises OutOfMemory, or ValueError for an empty prompt or a token that the model does not have.
        """


class Session(Reader, Protocol):
    """One model with one adapter on one device."""

    device: str  # "cpu", "cuda: NVIDIA GeForce RTX 4070", "gpu: Apple M3"
    scheme: str  # what the frozen weights are: "none", "nf4/64 double", "affine4/64", ...
    shortcuts: tuple[str, ...]  # what it computes in another way than the plain model, for speed or memory, in words
    lora_shapes: Modules
    repeatable: bool  # True: equal steps from equal states give equal bytes. A step may find that they do not
    team: Any  # a `team.Team` where several processes share each step; None: this one is alone

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        """One AdamW update from the mean loss over all micro-batches: sum(weight * nll) / sum(weight).

        total: to divide by instead of that sum, above 0; weights may then be below 0 too.
        Raises OutOfMemory, NonFinite, or ValueError for a token that the model does not have; then the state is as
        it was.
        """

    def states(self, batch: Batch) -> FloatArray:
        """What a head is given at the supervised positions, row by row: the last hidden states. [N, D]

        Dropout off, nothing changed. Raises as `score`, and BackendError where the session has no head.
        """

    def base_weight(self, module: str) -> FloatArray:
        """The weight of a layer, adapted or not, as the session multiplies with it: dequantised. [out, in]

        Without the adapter's product; of a whole model that trains, as it is now.

        module: the layer's name in the checkpoint. Raises BackendError where the model has no such layer.
        """

    def untrained(self) -> dict[str, FloatArray]:
        """What trains as it is before any step, made or read anew: with it the session is the base model."""

    def trained(self) -> dict[str, FloatArray]:
        """What trains as it is now: a copy."""

    def set_trained(self, tensors: Mapping[str, FloatArray]) -> None:
        """In the place of what trains; step and moments stay. Raises IncompatibleState."""

    def get_state(self) -> TrainState:
        """A copy; later steps do not change it."""

    def set_state(self, state: TrainState) -> None:
        """Raises IncompatibleState unless every name and shape fits; moments may be empty (all zero)."""

    @property
    def kept_states(self) -> Any:
        """What frozen blocks made of rows so far (`kept_states.Activations`); None where none are kept."""

    def take_kept_states(self, states: Any) -> None:
        """Those of an earlier session of the same base, whatever its adapter; unused where other blocks are frozen."""

    def peak_bytes(self) -> int:
        """The most memory in use so far: of the device, or of the process on a CPU."""

    def free_bytes(self) -> int | None:
        """Memory that the device can still give, where that is known."""


class ThisMachine(Protocol):
    """What a backend says of this machine. Importing the module loads the framework, and none of its models."""

    def probe(self) -> str | None:
        """None: usable here; else one sentence that says why not."""

    def describe(self, device: Wanted = "auto") -> dict[str, Any]:
        """`device`, `versions` (library -> version), whether it can do `4bit` and `checkpointing`, as `half` the type
        of 16 bits that the device is made for, and as `others` which other devices there are and how one is chosen.
        """

    def unused_accelerator(self) -> str | None:
        """Why an accelerator of this machine is not used by "auto", with the remedy; None: used, or there is none."""

    def free_bytes(self, device: Wanted = "auto") -> int | None:
        """Memory that the device can give, where that is known, before a model is loaded."""


class Backend(ThisMachine, Protocol):
    """What a backend's session module exports. Importing it loads the framework and its models."""

    def check_config(self, folder: CheckedFolder) -> None:
        """Raises BackendError for a model that the backend does not run, as far as config.json alone tells.

        Builds nothing of the config's sizes, which no weights confirm yet. Raises Unsupported for its type.
        """

    def check(self, model: ModelSpec, lora: LoraSpec) -> None:
        """Raises BackendError for what cannot be done with this model, before it or any data is loaded."""

    def open(self, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> Session:
        """A live session, never half-initialised. Raises BackendError for what cannot be done."""
