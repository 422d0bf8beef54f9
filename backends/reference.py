"""The contract as code: a small numpy backend that implements `interface.Session` in the plainest way.

The model is a bigram table in factors (`bigram`). It learns which token follows which, no more: a fast stand-in, never
chosen unless it is named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends.adapter_state import (
    NO_HEAD,
    NO_TEXT,
    fitting,
    fitting_trained,
    head_shape,
    initial_adapter,
    magnitudes_of,
)
from backends.arithmetic import adamw, clipped, log_softmax
from backends.interface import (
    BackendError,
    Batch,
    CheckedFolder,
    Device,
    FloatArray,
    LoraSpec,
    ModelSpec,
    Modules,
    NonFinite,
    NumberType,
    OptimSpec,
    OutOfMemory,
    Scores,
    StepResult,
    TrainState,
    Wanted,
)
from backends.matmul_speed import numpy_rate
from backends.memory import available_bytes, process_peak_bytes
from backends.micro_batches import check_tokens, numbered, total_of
from backends.model_folder import folder_of
from backends.predictions import Architecture, Costs, Machine
from backends.reference_model import Bigram, row_lengths
from backends.sampling import check_prompts
from backends.team import Team
from backends.whole_model import refuse_packed


def saved(architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int) -> float:
    return 4.0 * architecture.hidden


COSTS: dict[Device, Costs] = {"cpu": Costs("cpu", runtime=490e6, saved=saved, reached=0.6, maps_files=True)}
MACHINES: tuple[Machine, ...] = ()
SHORTCUTS: tuple[str, ...] = ()


def measured_rate(number_type: NumberType, device: Wanted = "auto") -> float:
    """Floating-point operations per second of numpy's matrix products here, in float32 whatever is asked for."""
    return numpy_rate()


def probe() -> str | None:
    return None


def unused_accelerator() -> str | None:
    return None


def describe(device: Wanted = "auto") -> dict[str, Any]:
    able = {"4bit": False, "checkpointing": False, "half": "bfloat16", "others": ""}
    return {"device": "cpu", "versions": {"numpy": np.__version__}} | able


def free_bytes(device: Wanted = "auto") -> int | None:
    return available_bytes()


def check_config(folder: CheckedFolder) -> None:
    """Any config will do: what the reference needs of it, it reads as it opens."""


def check(model: ModelSpec, lora: LoraSpec) -> None:
    """Raises BackendError for targets that the folder does not have."""
    if lora.whole:
        refuse_packed(model)
    _modules(folder_of(model), lora)


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> ReferenceSession:
    if model.quantize != "none" or model.dtype not in ("auto", "float32"):
        raise BackendError("the reference backend computes in float32 alone; use quantize: none and dtype: auto")
    folder = folder_of(model)
    if lora.whole:
        refuse_packed(model)
    modules, vocabulary = _modules(folder, lora), folder.config.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise BackendError(f"{model.path}: config.json has no vocab_size")
    head = head_shape(folder, lora)
    return ReferenceSession(modules, vocabulary, lora, optim, seed, head[1] if head else 0)


class ReferenceSession(Bigram):
    shares_prefixes = True  # a bigram model never looks at them
    shortcuts: tuple[str, ...] = ()
    repeatable: bool = True
    team: Team | None = None

    def __init__(
        self, modules: Modules, vocabulary: int, lora: LoraSpec, optim: OptimSpec, seed: int, hidden: int = 0
    ) -> None:
        """hidden: D, the width of what a classification head is given; without one the states are the logits."""
        self.device, self.scheme, self.lora_shapes = "cpu", "none", modules
        self._lora, self._optim, self._seed, self._vocabulary = lora, optim, seed, vocabulary
        super().__init__(modules, vocabulary, hidden)
        self._classes = (lora.classes, hidden) if lora.classes else None
        lengths = {module: row_lengths(weight) for module, weight in self._frozen.items()} if lora.dora else {}
        self._magnitudes = magnitudes_of(lengths)
        start = self.untrained()
        self._shapes = {name: value.shape for name, value in start.items()}
        self.set_state(TrainState(0, start, {}))

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        total = total_of(micro, self.team.weight if self.team else total)
        check_tokens(micro, self._vocabulary, self._lora.classes)
        with _memory_guard(), np.errstate(all="ignore"):
            loss, grads = 0.0, {name: np.zeros_like(value) for name, value in self._adapter.items()}
            for batch in numbered(micro):
                part, part_grads = self._gradient(batch, total)
                loss += part
                grads = {name: grads[name] + part_grads[name] for name in grads}
            if self.team:
                (*summed, whole), lr = self.team.sum([*grads.values(), np.float32(loss)], lr)
                loss, grads = float(whole), dict(zip(grads, summed, strict=True))
            norm, applied = clipped(grads, self._optim.clip_norm)
            new = {name: self._updated(name, applied[name], lr) for name in self._adapter}
        if not np.isfinite([loss, norm]).all() or not all(np.isfinite(value[0]).all() for value in new.values()):
            raise NonFinite(f"loss {loss}, gradient norm {norm} in step {self._step + 1}")
        for name, (weight, m, v) in new.items():
            self._adapter[name], self._moments[f"{name}.exp_avg"], self._moments[f"{name}.exp_avg_sq"] = weight, m, v
        self._step += 1
        return StepResult(loss, sum(int(np.count_nonzero(batch.weights)) for batch in micro), norm)

    def score(self, batch: Batch) -> Scores:
        check_tokens([batch], self._vocabulary, self._lora.classes)
        chosen = batch.weights != 0  # [B, T]
        logprob, greedy = np.zeros(chosen.shape, np.float32), np.zeros(chosen.shape, np.int32)
        with _memory_guard(), np.errstate(all="ignore"):
            logits = self._logits(batch.inputs[chosen])  # [N, V]
            logprob[chosen] = log_softmax(logits)[np.arange(len(logits)), batch.targets[chosen]]
            greedy[chosen] = logits.argmax(-1)
        return Scores(logprob, greedy)

    def states(self, batch: Batch) -> FloatArray:
        if not self._lora.classes:
            raise BackendError(NO_HEAD)
        check_tokens([batch], self._vocabulary, self._lora.classes)
        with _memory_guard(), np.errstate(all="ignore"):
            return self._states(batch.inputs[batch.weights != 0])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        if self._lora.classes:
            raise BackendError(NO_TEXT)
        check_prompts(prompts, self._vocabulary)
        completions: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            rng = np.random.default_rng((seed, row))
            written: list[int] = []
            while len(written) < max_tokens:
                logits = self._logits(np.array([[*prompt, *written][-1]]))[0]  # [V]
                if temperature:
                    logits = logits / temperature + rng.gumbel(size=logits.shape)  # its argmax is a softmax sample
                token = int(logits.argmax())
                if token in stop:
                    break
                written.append(token)
            completions.append(written)
        return completions

    def base_weight(self, module: str) -> FloatArray:
        if module not in self._frozen:
            raise BackendError(f"{module} is not a layer of this model")
        weight: FloatArray = self._layer(module).copy()
        return weight

    def untrained(self) -> dict[str, FloatArray]:
        if not self._lora.whole:
            return initial_adapter(self.lora_shapes, self._lora.rank, self._seed, self._classes, self._magnitudes)
        return {name: value.copy() for name, value in self._weights().items()}

    def trained(self) -> dict[str, FloatArray]:
        return {name: value.copy() for name, value in self._adapter.items()}

    def set_trained(self, tensors: Mapping[str, FloatArray]) -> None:
        self._adapter = {name: value.copy() for name, value in fitting_trained(tensors, self._shapes).items()}

    def get_state(self) -> TrainState:
        return TrainState(self._step, self.trained(), {name: value.copy() for name, value in self._moments.items()})

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        self._step = state.step
        self._adapter = {name: value.copy() for name, value in state.adapter.items()}
        self._moments = {name: value.copy() for name, value in state.moments.items()}

    @property
    def kept_states(self) -> None:
        return None

    def take_kept_states(self, states: Any) -> None:
        """Every block has an adapter here."""

    def peak_bytes(self) -> int:
        return process_peak_bytes()

    def free_bytes(self) -> int | None:
        return available_bytes()

    def _updated(self, name: str, grad: FloatArray, lr: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        m, v = self._moments[f"{name}.exp_avg"], self._moments[f"{name}.exp_avg_sq"]
        return adamw(self._adapter[name], grad, m, v, self._step + 1, lr, self._optim)


@contextmanager
def _memory_guard() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"cpu: {error}") from error


def _modules(folder: CheckedFolder, lora: LoraSpec) -> dict[str, tuple[int, int]]:
    if folder.weights:
        return folder.lora_modules(lora)
    unknown = [target for target in lora.targets if target != "proj"]
    if unknown:
        raise BackendError(f"{folder.path}: no linear layer named {', '.join(unknown)}; there is proj")
    return {"model.layers.0.proj": (32, 32)}
