"""The contract, executable: a tiny numpy model that keeps every promise of `interface.Session` in the plainest way.

The model is a bigram table in factors. With x = E[token], its logits are the sum over the adapted modules of

    U (W x + scale * B A dropout(x)), and with DoRA U (m / |W + scale * B A| * (W + scale * B A) x)

where E [V, in] and U [V, out] are shared by modules of one size, and |..| are the lengths of a matrix's rows. E, U
and W are random, the same for every seed, and frozen; modules and shapes are the folder's own (without weights in it,
one module of 32 x 32).
With a classification head U is [D, out], the sum is the states h, and the logits are S h with S trained.
It learns which token follows which, no more: a fast stand-in, never chosen unless it is named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends import dropout
from backends.adapter_state import (
    NO_HEAD,
    NO_TEXT,
    adapter_shapes,
    fitting,
    head_shape,
    initial_adapter,
    magnitudes_of,
)
from backends.arithmetic import Arrays, adamw, clipped, log_softmax
from backends.interface import (
    HEAD_WEIGHT,
    MAGNITUDE,
    BackendError,
    Batch,
    CheckedFolder,
    Device,
    FloatArray,
    IntArray,
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
from backends.memory import available_bytes, process_peak_bytes
from backends.micro_batches import check_tokens, numbered, places_of, total_of
from backends.model_folder import folder_of
from backends.predictions import Architecture, Costs, Machine
from backends.rate import SIZES, operations_per_second
from backends.sampling import check_prompts
from backends.team import Team


def saved(architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int) -> float:
    return 4.0 * architecture.hidden


COSTS: dict[Device, Costs] = {"cpu": Costs("cpu", runtime=490e6, saved=saved, reached=0.6, maps_files=True)}
MACHINES: tuple[Machine, ...] = ()
SHORTCUTS: tuple[str, ...] = ()


def measured_rate(number_type: NumberType, device: Wanted = "auto") -> float:
    """Floating-point operations per second of numpy's matrix products here, in float32 whatever is asked for."""
    rows, width = SIZES["cpu"]
    x, weight = np.ones((rows, width), np.float32), np.full((width, width), 1 / width, np.float32)
    return operations_per_second(x, weight, lambda y: y)


def probe() -> str | None:
    return None


def unused_accelerator() -> str | None:
    return None


def describe(device: Wanted = "auto") -> dict[str, Any]:
    able = {"4bit": False, "checkpointing": False, "half": "bfloat16"}
    return {"device": "cpu", "versions": {"numpy": np.__version__}} | able


def free_bytes(device: Wanted = "auto") -> int | None:
    return available_bytes()


def check(model: ModelSpec, lora: LoraSpec) -> None:
    """Raises BackendError for targets that the folder does not have."""
    _modules(folder_of(model), lora)


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> ReferenceSession:
    if model.quantize != "none" or model.dtype not in ("auto", "float32"):
        raise BackendError("the reference backend computes in float32 alone; use quantize: none and dtype: auto")
    folder = folder_of(model)
    modules, vocabulary = _modules(folder, lora), folder.config.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise BackendError(f"{model.path}: config.json has no vocab_size")
    head = head_shape(folder, lora)
    return ReferenceSession(modules, vocabulary, lora, optim, seed, head[1] if head else 0)


class ReferenceSession:
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
        rng = np.random.default_rng(20190111)  # the base is one model, whatever the run's seed
        inputs, outputs = sorted({i for _, i in modules.values()}), sorted({o for o, _ in modules.values()})
        self._embed = {i: _normal(rng, (vocabulary, i), 1.0) for i in inputs}
        self._head = {o: _normal(rng, (hidden or vocabulary, o), o**-0.5) for o in outputs}
        self._frozen = {m: _normal(rng, (o, i), (i * len(modules)) ** -0.5) for m, (o, i) in modules.items()}
        head = (lora.classes, hidden) if lora.classes else None
        self._shapes = adapter_shapes(modules, lora.rank, head, lora.dora)
        lengths = {module: _lengths(weight) for module, weight in self._frozen.items()} if lora.dora else {}
        self.base_magnitudes = magnitudes_of(lengths)
        self.set_state(TrainState(0, initial_adapter(modules, lora.rank, seed, head, self.base_magnitudes), {}))

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
        weight: FloatArray = self._frozen[module].copy()
        return weight

    def get_state(self) -> TrainState:
        copies = [{name: value.copy() for name, value in held.items()} for held in (self._adapter, self._moments)]
        return TrainState(self._step, *copies)

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        self._step, self._adapter, self._moments = state.step, dict(state.adapter), dict(state.moments)

    @property
    def kept_states(self) -> None:
        return None

    def take_kept_states(self, states: Any) -> None:
        """Every block has an adapter here."""

    def peak_bytes(self) -> int:
        return process_peak_bytes()

    def free_bytes(self) -> int | None:
        return available_bytes()

    def _logits(self, tokens: IntArray, masks: Mapping[str, FloatArray] | None = None) -> FloatArray:
        """[N] -> [N, V], or with a head [N, K]; `masks` as in `_states`."""
        states = self._states(tokens, masks)
        return states @ self._adapter[HEAD_WEIGHT].T if self._lora.classes else states

    def _states(self, tokens: IntArray, masks: Mapping[str, FloatArray] | None = None) -> FloatArray:
        """[N] -> [N, D]; `masks` holds each module's dropout mask [N, in], already over 1 - p."""
        states = np.zeros((len(tokens), len(next(iter(self._head.values())))), np.float32)
        for module, (outputs, inputs) in self.lora_shapes.items():
            x = self._embed[inputs][tokens]  # [N, in]
            dropped = x if masks is None else x * masks[module]
            states += (self._gate(module) * self._product(module, x, dropped)) @ self._head[outputs].T
        return states

    def _product(self, module: str, x: FloatArray, dropped: FloatArray) -> FloatArray:
        """W x + scale * B A dropout(x). [N, out]"""
        a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
        product: FloatArray = x @ self._frozen[module].T + self._lora.scale * (dropped @ a.T) @ b.T
        return product

    def _gate(self, module: str) -> FloatArray:
        """What DoRA multiplies a module's outputs by: m / |W + scale * B A| [out]; without it 1."""
        if not self._lora.dora:
            return np.ones(1, np.float32)
        a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
        adapted: FloatArray = (self._frozen[module] + self._lora.scale * b @ a).astype(np.float32)
        gate: FloatArray = self._adapter[f"{module}.{MAGNITUDE}"] / _lengths(adapted)
        return gate

    def _gradient(self, batch: Batch, total: float) -> tuple[float, Arrays]:
        """sum(w * nll) / total over this micro-batch, and its gradient for every adapter tensor."""
        chosen = batch.weights != 0
        tokens, targets = batch.inputs[chosen], batch.targets[chosen]  # [N]
        share = batch.weights[chosen] / np.float32(total)  # [N]
        masks = self._dropout(places_of(batch)[chosen])
        logs = log_softmax(self._logits(tokens, masks))  # [N, V]
        rows, grad_logits = np.arange(len(tokens)), np.exp(logs)
        grad_logits[rows, targets] -= 1  # d nll / d logits = softmax - one hot
        grad_logits *= share[:, None]
        grads: Arrays = {}
        grad_states = grad_logits  # [N, D]
        if self._lora.classes:
            grads[HEAD_WEIGHT] = grad_logits.T @ self._states(tokens, masks)
            grad_states = grad_logits @ self._adapter[HEAD_WEIGHT]
        for module, (outputs, inputs) in self.lora_shapes.items():
            a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
            whole = self._embed[inputs][tokens]
            x, gate = whole * masks[module], self._gate(module)  # [N, in]
            grad_output = self._lora.scale * gate * (grad_states @ self._head[outputs])  # [N, out]
            grads |= {f"{module}.lora_A": (grad_output @ b).T @ x, f"{module}.lora_B": grad_output.T @ (x @ a.T)}
            if self._lora.dora:  # the lengths count as constants, as in the paper
                magnitude = f"{module}.{MAGNITUDE}"
                of_gate = ((grad_states @ self._head[outputs]) * self._product(module, whole, x)).sum(0)
                grads[magnitude] = of_gate * gate / self._adapter[magnitude]
        return float(np.sum(share * -logs[rows, targets], dtype=np.float64)), grads

    def _dropout(self, where: dropout.Places) -> Arrays:
        """Each module's mask [N, in] over what it keeps on average; `where` [N] the tokens stand."""
        probability, modules = self._lora.dropout, self.lora_shapes
        if not probability:
            return {module: np.ones((len(where), inputs), np.float32) for module, (_, inputs) in modules.items()}
        tokens = dropout.token_words(self._seed, self._step, where)
        kept = zip(modules.items(), dropout.keys(tokens, dropout.module_words(modules)), strict=True)
        share = np.float32(dropout.kept_share(probability))
        return {module: dropout.mask(keys, inputs, probability) / share for (module, (_, inputs)), keys in kept}

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


def _lengths(weight: FloatArray) -> FloatArray:
    """Of the rows. [out]"""
    lengths: FloatArray = np.linalg.norm(weight, axis=1).astype(np.float32)
    return lengths


def _normal(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> FloatArray:
    return (rng.standard_normal(shape) * deviation).astype(np.float32)
