"""The reference backend with one fault planted in each; every one is something a fine-tuner has really got wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from backends import reference
from backends.interface import HEAD_WEIGHT, MAGNITUDE, Batch, LoraSpec, OptimSpec, Scores, StepResult, TrainState
from backends.reference import ReferenceSession

adamw, clipped = reference.adamw, reference.clipped


def with_lora(change: Callable[[LoraSpec], LoraSpec]) -> type[ReferenceSession]:
    class Mutant(ReferenceSession):
        def __init__(
            self, modules: Any, vocabulary: int, lora: LoraSpec, optim: OptimSpec, seed: int, hidden: int
        ) -> None:
            super().__init__(modules, vocabulary, change(lora), optim, seed, hidden)

    return Mutant


def with_batch(change: Callable[[Batch], Batch]) -> type[ReferenceSession]:
    class Mutant(ReferenceSession):
        def _gradient(self, batch: Batch, total: float) -> Any:
            return super()._gradient(change(batch), total)

    return Mutant


class SeedIgnored(ReferenceSession):
    def __init__(self, modules: Any, vocabulary: int, lora: LoraSpec, optim: OptimSpec, seed: int, hidden: int) -> None:
        super().__init__(modules, vocabulary, lora, optim, 0, hidden)


class MeanOfMeans(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        self.count = len(micro)
        return super().step(micro, lr, total)

    def _gradient(self, batch: Batch, total: float) -> Any:
        return super()._gradient(batch, max(float(batch.weights.sum()), 1e-9) * self.count)


class DropoutInScore(ReferenceSession):
    def _logits(self, tokens: Any, kept: Any = None) -> Any:
        return super()._logits(tokens, kept or self._dropout(np.arange(len(tokens))))


class DropoutForgetsTheStep(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        step, self._step = self._step, 0
        try:
            return super()._dropout(where)
        finally:
            self._step = step


class DropoutForgetsTheRow(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        return super()._dropout(where % 2**32)


class DropoutForgetsThePosition(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        return super()._dropout(where >> 32 << 32)


class DropoutOfTheMicroBatch(ReferenceSession):
    """Tokens are counted anew in each micro-batch, as they come."""

    def _dropout(self, where: Any) -> Any:
        return super()._dropout(np.arange(len(where)))


class SameDropoutInEveryModule(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        masks = super()._dropout(where)
        first = {mask.shape: mask for mask in masks.values()}
        return {module: first[mask.shape] for module, mask in masks.items()}


class SameDropoutInEveryBlock(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        masks = super()._dropout(where)
        return {module: masks[module.replace("layers.1.", "layers.0.")] for module in masks}


class DropoutFromOneStream(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        self.drawn = getattr(self, "drawn", 0) + len(where)
        return super()._dropout(np.arange(self.drawn, self.drawn + len(where)))


class DropoutNotScaled(ReferenceSession):
    def _dropout(self, where: Any) -> Any:
        return {module: np.sign(mask) for module, mask in super()._dropout(where).items()}


class MomentsNotRestored(ReferenceSession):
    def set_state(self, state: TrainState) -> None:
        super().set_state(replace(state, moments={}))


class StepNotRestored(ReferenceSession):
    def set_state(self, state: TrainState) -> None:
        super().set_state(replace(state, step=0))


class BaseWeightWithTheAdapter(ReferenceSession):
    def base_weight(self, module: str) -> Any:
        a, b = self._adapter[f"{module}.lora_A"], self._adapter[f"{module}.lora_B"]
        return super().base_weight(module) + self._lora.scale * b @ a


class BaseWeightRounded(ReferenceSession):
    def base_weight(self, module: str) -> Any:
        return super().base_weight(module).astype(np.float16).astype(np.float32)


class BaseWeightIsALiveView(ReferenceSession):
    def base_weight(self, module: str) -> Any:
        return self._frozen.get(module) if module in self._frozen else super().base_weight(module)


class StateIsALiveView(ReferenceSession):
    def get_state(self) -> TrainState:
        return TrainState(self._step, self._adapter, self._moments)


class TrainedIsALiveView(ReferenceSession):
    def trained(self) -> Any:
        return self._adapter

    def get_state(self) -> TrainState:
        return TrainState(self._step, *copies(self._adapter, self._moments))


class MomentsGoWithWhatTrains(ReferenceSession):
    def set_trained(self, tensors: Any) -> None:
        self.set_state(TrainState(self._step, tensors, {}))


class TrainedIsTheStart(ReferenceSession):
    def trained(self) -> Any:
        return self.untrained()

    def get_state(self) -> TrainState:
        return TrainState(self._step, *copies(self._adapter, self._moments))


def copies(*held: Any) -> Any:
    return ({name: value.copy() for name, value in one.items()} for one in held)


class StateIsNotCopiedIn(ReferenceSession):
    def set_state(self, state: TrainState) -> None:
        super().set_state(state)
        self._adapter = dict(state.adapter)


class StepCountedThoughRefused(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        try:
            return super().step(micro, lr, total)
        except ArithmeticError:
            raise
        except Exception:
            self._step += 1
            raise


class BaseIsTrained(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        result = super().step(micro, lr, total)
        self._frozen = {name: value * np.float32(1.001) for name, value in self._frozen.items()}
        return result


class RateIgnored(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        return super().step(micro, 1e-2, total)


class NormAfterClipping(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        result = super().step(micro, lr, total)
        return replace(result, grad_norm=min(result.grad_norm, self._optim.clip_norm or np.inf))


class PadsCounted(ReferenceSession):
    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        return replace(super().step(micro, lr, total), tokens=sum(batch.weights.size for batch in micro))


class EverythingScored(ReferenceSession):
    def score(self, batch: Batch) -> Scores:
        return super().score(replace(batch, weights=np.ones_like(batch.weights)))


class HeadIsNotTrained(ReferenceSession):
    def _gradient(self, batch: Batch, total: float) -> Any:
        loss, grads = super()._gradient(batch, total)
        return loss, {name: grad * 0 if name == HEAD_WEIGHT else grad for name, grad in grads.items()}


class HeadSeesTheBase(ReferenceSession):
    def states(self, batch: Batch) -> Any:
        zero = {name: value * 0 if name.endswith("lora_B") else value for name, value in self._adapter.items()}
        with mock.patch.object(self, "_adapter", zero):
            return super().states(batch)


class EmbeddingIsNotTrained(ReferenceSession):
    def _of_weights(self, tokens: Any, grad_states: Any) -> Any:
        grads = super()._of_weights(tokens, grad_states)
        return {name: grad * (not name.startswith("embedding")) for name, grad in grads.items()}


class PadsAreNotTrained(ReferenceSession):
    """As torch does where an embedding has a padding token."""

    def _of_weights(self, tokens: Any, grad_states: Any) -> Any:
        grads = super()._of_weights(tokens, grad_states)
        for name, grad in grads.items():
            grad[0] *= not name.startswith("embedding")
        return grads


class UntrainedIsNow(ReferenceSession):
    def untrained(self) -> Any:
        return self.get_state().adapter if hasattr(self, "_adapter") else super().untrained()


class MagnitudesAreNotTrained(ReferenceSession):
    def _gradient(self, batch: Batch, total: float) -> Any:
        loss, grads = super()._gradient(batch, total)
        return loss, {name: grad * 0 if name.endswith(MAGNITUDE) else grad for name, grad in grads.items()}


class LengthsOfTheBase(ReferenceSession):
    def _gate(self, module: str) -> Any:
        name = f"{module}.{MAGNITUDE}"
        return self._adapter[name] / self._magnitudes[name] if self._lora.dora else super()._gate(module)


class LengthsAreNotConstants(ReferenceSession):
    """The gradient of A and B as if m alone were in the gate's numerator, and all of it learned."""

    def _gradient(self, batch: Batch, total: float) -> Any:
        loss, grads = super()._gradient(batch, total)
        factors = {m: float(np.mean(self._gate(m))) for m in self.lora_shapes}
        return loss, {
            name: grad if name.endswith(MAGNITUDE) else grad * np.float32(factors.get(name.rpartition(".")[0], 1.0))
            for name, grad in grads.items()
        }


class PoorestToken(ReferenceSession):
    def score(self, batch: Batch) -> Scores:
        scores = super().score(batch)
        return replace(scores, greedy=(scores.greedy + 1) % 128 * (batch.weights != 0))


class StopTokenKept(ReferenceSession):
    def generate(self, prompts: Any, max_tokens: int, stop: Collection[int], *rest: Any, **more: Any) -> Any:
        whole = super().generate(prompts, max_tokens, (), *rest, **more)
        ends = [next((i for i, token in enumerate(row) if token in stop), max_tokens) for row in whole]
        return [row[: end + 1] for row, end in zip(whole, ends, strict=True)]


class PromptEchoed(ReferenceSession):
    def generate(self, prompts: Any, *rest: Any, **more: Any) -> Any:
        return [[*prompt, *row] for prompt, row in zip(prompts, super().generate(prompts, *rest, **more), strict=True)]


class SamplingUnseeded(ReferenceSession):
    def generate(self, prompts: Any, max_tokens: int, stop: Any, temperature: float = 0.0, seed: int = 0) -> Any:
        return super().generate(prompts, max_tokens, stop, temperature, int(np.random.default_rng().integers(2**32)))


SESSIONS: dict[str, type[ReferenceSession]] = {
    "scale is alpha": with_lora(lambda lora: replace(lora, alpha=lora.alpha * lora.rank)),
    "scale ignores alpha": with_lora(lambda lora: replace(lora, alpha=2.0 * lora.rank)),
    "no dropout": with_lora(lambda lora: replace(lora, dropout=0.0)),
    "pads trained": with_batch(lambda batch: replace(batch, weights=np.ones_like(batch.weights))),
    "one row dropped": with_batch(lambda b: Batch(b.inputs[:-1], b.targets[:-1], b.weights[:-1])),
    "weights all one": with_batch(lambda batch: replace(batch, weights=np.sign(batch.weights))),
    "rows numbered anew in each micro-batch": with_batch(lambda b: replace(b, rows=tuple(range(len(b.inputs))))),
    "targets not shifted": with_batch(lambda batch: replace(batch, targets=batch.inputs)),
} | {
    mutant.__name__: mutant
    for mutant in (
        SeedIgnored,
        MeanOfMeans,
        DropoutInScore,
        DropoutForgetsTheStep,
        DropoutForgetsTheRow,
        DropoutForgetsThePosition,
        DropoutOfTheMicroBatch,
        SameDropoutInEveryModule,
        SameDropoutInEveryBlock,
        DropoutFromOneStream,
        DropoutNotScaled,
        MomentsNotRestored,
        StepNotRestored,
        BaseWeightWithTheAdapter,
        BaseWeightRounded,
        BaseWeightIsALiveView,
        StateIsALiveView,
        TrainedIsALiveView,
        MomentsGoWithWhatTrains,
        TrainedIsTheStart,
        StateIsNotCopiedIn,
        StepCountedThoughRefused,
        BaseIsTrained,
        RateIgnored,
        NormAfterClipping,
        PadsCounted,
        EverythingScored,
        HeadIsNotTrained,
        HeadSeesTheBase,
        EmbeddingIsNotTrained,
        PadsAreNotTrained,
        UntrainedIsNow,
        MagnitudesAreNotTrained,
        LengthsOfTheBase,
        LengthsAreNotConstants,
        PoorestToken,
        StopTokenKept,
        PromptEchoed,
        SamplingUnseeded,
    )
}


def _uncorrected(weight: Any, grad: Any, m: Any, v: Any, number: int, lr: float, optim: OptimSpec) -> Any:
    return adamw(weight, grad, m, v, 10**6, lr, optim)


def _coupled(weight: Any, grad: Any, m: Any, v: Any, number: int, lr: float, optim: OptimSpec) -> Any:
    free = replace(optim, weight_decay=0.0)
    return adamw(weight, grad + optim.weight_decay * weight, m, v, number, lr, free)


def _undecayed(weight: Any, grad: Any, m: Any, v: Any, number: int, lr: float, optim: OptimSpec) -> Any:
    return adamw(weight, grad, m, v, number, lr, replace(optim, weight_decay=0.0))


def _epsilon_inside(weight: Any, grad: Any, m: Any, v: Any, number: int, lr: float, optim: OptimSpec) -> Any:
    _, m, v = adamw(weight, grad, m, v, number, lr, optim)
    root = np.sqrt(v / (1 - optim.betas[1] ** number) + optim.eps)
    return weight * (1 - lr * optim.weight_decay) - lr * m / (1 - optim.betas[0] ** number) / root, m, v


def _each_alone(grads: Any, limit: float | None) -> Any:
    return clipped(grads, limit)[0], {name: clipped({name: grad}, limit)[1][name] for name, grad in grads.items()}


def _by_value(grads: Any, limit: float | None) -> Any:
    bound = np.inf if limit is None else limit
    return clipped(grads, limit)[0], {name: np.clip(grad, -bound, bound) for name, grad in grads.items()}


def _always(grads: Any, limit: float | None) -> Any:
    norm = clipped(grads, None)[0]
    return norm, {name: grad * np.float32((limit or norm) / (norm + 1e-6)) for name, grad in grads.items()}


FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "no bias correction": ("adamw", _uncorrected),
    "coupled decay": ("adamw", _coupled),
    "no decay": ("adamw", _undecayed),
    "epsilon inside the root": ("adamw", _epsilon_inside),
    "no clipping": ("clipped", lambda grads, limit: clipped(grads, None)),
    "every tensor clipped alone": ("clipped", _each_alone),
    "clipped by value": ("clipped", _by_value),
    "scaled up to the limit": ("clipped", _always),
    "any token accepted": ("check_tokens", lambda batches, vocabulary, classes: None),
    "any prompt accepted": ("check_prompts", lambda prompts, vocabulary: None),
    "any state accepted": ("fitting", lambda state, shapes: state),
    "adapter ignores the seed": ("initial_adapter", lambda shapes, rank, seed, *rest: _initial(shapes, rank, 0, *rest)),
}
_initial = reference.initial_adapter
