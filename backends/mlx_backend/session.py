"""LoRA and QLoRA in MLX: Apple silicon, CUDA and the CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from backends.adapter_state import (
    NO_HEAD,
    NO_TEXT,
    adapted_modules,
    fitting,
    fitting_trained,
    trained_shapes,
    untrained,
)
from backends.config_sizes import answering_bytes
from backends.interface import (
    HEAD_WEIGHT,
    BackendError,
    Batch,
    CheckedFolder,
    FloatArray,
    LoraSpec,
    ModelSpec,
    NonFinite,
    OptimSpec,
    Scores,
    StepResult,
    TrainState,
)
from backends.kept_states import Keeping
from backends.layer_names import Names, Part
from backends.loss_scale import loss_scales
from backends.micro_batches import check_tokens, joined, numbered, own_part, total_of
from backends.mlx_backend import blas_bridge
from backends.mlx_backend.costs import NUMPY_PRODUCTS
from backends.mlx_backend.device import (
    bound_memory,
    device_kind,
    device_name,
    free_of,
    half_type,
    held_bytes,
    memory_guard,
    pick_device,
)
from backends.mlx_backend.embedding_scale import as_transformers_embeds
from backends.mlx_backend.forward import Forward
from backends.mlx_backend.generate import generate
from backends.mlx_backend.lora import Dropout, base_weight
from backends.mlx_backend.machine import describe as describe
from backends.mlx_backend.machine import free_bytes as free_bytes
from backends.mlx_backend.machine import probe as probe
from backends.mlx_backend.machine import unused_accelerator as unused_accelerator
from backends.mlx_backend.model import check_window, ignored_window
from backends.mlx_backend.optim import AdamW, Tensors
from backends.mlx_backend.recompute import recompute_blocks
from backends.mlx_backend.state import State, to_mlx, to_numpy
from backends.mlx_backend.streamed import opened
from backends.mlx_backend.trainable import Adapters, Weights, check_whole, trained_weights
from backends.mlx_backend.tree import check_format, check_taken, check_type, parts_of
from backends.model_folder import folder_of
from backends.sampling import check_prompts, room_for_answers
from backends.streaming import Advance, guarded
from backends.team import Team
from backends.whole_model import refuse_half


def check_config(folder: CheckedFolder) -> None:
    check_format(folder)
    check_type(folder)


def check(model: ModelSpec, lora: LoraSpec) -> None:
    """Raises BackendError for a folder or targets that cannot be used, as far as config and shapes tell."""
    folder = folder_of(model)
    if lora.whole:
        check_whole(model)
    check_format(folder)
    check_taken(folder)  # the first, as its words on packed weights are those of `open`
    parts_of(folder, folder.lora_modules(lora))


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> MlxSession:
    """Raises BackendError where the model or what is asked of it cannot be had in MLX."""
    device = pick_device(model.device)
    bound_memory(device)
    with mx.stream(device), memory_guard():
        return MlxSession(model, lora, optim, seed, device)


class MlxSession(Keeping):
    """`interface.Session` in MLX. Adapter and moments are float32 in mlx-lm's layout: A [in, r], B [r, out]; the
    weights of a whole model lie as in its files.
    """

    def __init__(self, spec: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int, device: mx.Device) -> None:
        on_cpu = device.type == mx.cpu
        self._number_type = spec.number_type(device_kind(device), half_type(device))
        dtype = getattr(mx, self._number_type)
        self.device = device_name(device)
        self._folder = folder = folder_of(spec)
        self._answering = answering_bytes(folder.text_config, spec.number_bytes(device_kind(device)))
        self.lora_shapes, self._shapes = adapted_modules(spec, lora), trained_shapes(spec, lora)
        self._spec, self._lora, self._seed, self._classes = spec, lora, seed, lora.classes
        if lora.whole:
            refuse_half(spec, device_kind(device), half_type(device))
        self._adamw, self._mlx_device, self._on_cpu = AdamW(optim, compiled=not on_cpu), device, on_cpu
        model, self.scheme, self._streamed = opened(spec, dtype, self.lora_shapes)
        masks = Dropout(lora.dropout, seed, self.lora_shapes)
        self._held = trained_weights(model, spec, lora, masks)
        bridged = blas_bridge.serves(device, dtype, spec.checkpointing)
        if bridged:
            blas_bridge.connect(model, lora.whole)
            if self._streamed:
                self._streamed.own_code.append(blas_bridge.connect)
        as_transformers_embeds(model, dtype)  # last: the bridge knows layers by their classes
        if spec.checkpointing:
            recompute_blocks(model, masks)
        window = ignored_window(model, folder.text_config)
        self._forward: Forward = Forward(model, masks, on_cpu, window, lora.classes, self._streamed)
        if bridged:
            self._forward.compute_at_once()
        self.shares_prefixes = self._forward.shares_prefixes
        self._vocabulary = folder.vocabulary or sys.maxsize
        self.left_out: Mapping[str, str] = self._forward.left_out  # shortcut -> why the model does without it
        self.shortcuts = (*self._forward.shortcuts, *([NUMPY_PRODUCTS] if bridged else []))
        self.repeatable = True
        self.team: Team | None = None
        self._trained, self._most_held = False, 0
        if isinstance(self._held, Weights):
            self._forward.head.find_trained([*self._held.places.values()])
        self._magnitudes = self._held.magnitudes() if isinstance(self._held, Adapters) and lora.dora else {}
        self._state: State
        self.set_state(TrainState(0, self.untrained(), {}))

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        total = total_of(micro, self.team.weight if self.team else total)
        check_tokens(micro, self._vocabulary, self._classes)
        with self._running(training=True):
            for scale in loss_scales(self._number_type, total):
                loss, grads = self._loss_and_grads(micro, total, scale)
                if self.team:
                    loss, grads, lr = self._summed(self.team, loss, grads, lr)
                norm = float(mx.sqrt(mx.stack([mx.square(grad).sum() for grad in grads.values()]).sum()))
                if math.isfinite(norm):
                    break
            step = self._state.step + 1
            updated = State(step, *self._adamw(self._state.adapter, self._state.moments, grads, norm, step, lr))
            finite = mx.stack([mx.isfinite(value).all() for value in updated.adapter.values()]).all()
            mx.eval(finite, updated.adapter, updated.moments)
            if not (math.isfinite(loss) and math.isfinite(norm) and finite.item()):
                raise NonFinite(f"loss {loss}, gradient norm {norm} in step {step}")
            self._state = updated
        return StepResult(loss, int(sum(np.count_nonzero(batch.weights) for batch in micro)), norm)

    def score(self, batch: Batch) -> Scores:
        check_tokens([batch], self._vocabulary, self._classes)
        with self._running():
            if self.shares_prefixes:
                return self._forward.scores(batch)
            return own_part(self._forward.scores(joined(batch)), batch)

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        return guarded(self._forward.read_ahead(batches), self._running)

    def states(self, batch: Batch) -> FloatArray:
        if not self._classes:
            raise BackendError(NO_HEAD)
        check_tokens([batch], self._vocabulary, self._classes)
        with self._running():
            return self._forward.last_states(batch if self.shares_prefixes else joined(batch))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        if self._classes:
            raise BackendError(NO_TEXT)
        check_prompts(prompts, self._vocabulary)
        check_window(max(map(len, prompts), default=0) + max_tokens, self._forward.window)
        with self._running():
            room = room_for_answers(self.free_bytes(), self._answering)
            settings = max_tokens, stop, temperature, seed, room
            return generate(self._forward.model, self._forward.head, prompts, *settings)

    def base_weight(self, module: str) -> FloatArray:
        held = self._streamed.holding(module) if self._streamed else nullcontext()
        with memory_guard(), mx.stream(self._mlx_device), held:
            return base_weight(self._forward.model, self._parts.get(module, (Part(module, 0, 0),)))

    @cached_property
    def _parts(self) -> Names:
        """Where the layers of all blocks are, adapted or not."""
        return parts_of(self._folder, self._folder.lora_modules(LoraSpec(1, 1.0)))

    def untrained(self) -> dict[str, FloatArray]:
        return untrained(self._spec, self._lora, self._seed, self._magnitudes)

    def trained(self) -> dict[str, FloatArray]:
        return to_numpy(self._state.adapter, self._held.transposed)

    def set_trained(self, tensors: Mapping[str, FloatArray]) -> None:
        fitted = to_mlx(fitting_trained(tensors, self._shapes), self._held.transposed)
        self._state = State(self._state.step, fitted, self._state.moments)
        self._put_in(self._state.adapter)

    def get_state(self) -> TrainState:
        return TrainState(self._state.step, self.trained(), to_numpy(self._state.moments, self._held.transposed))

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        tensors = (to_mlx(one, self._held.transposed) for one in (state.adapter, state.moments))
        self._state = State(state.step, *tensors)
        self._put_in(self._state.adapter)

    def peak_bytes(self) -> int:
        self._most_held = max(self._most_held, held_bytes(self._mlx_device))
        return self._most_held

    def free_bytes(self) -> int | None:
        return free_of(self._mlx_device)

    @contextmanager
    def _running(self, training: bool = False) -> Iterator[None]:
        """On the session's device, with its adapter in the model, also afterwards, however a call ends."""
        if training != self._trained:  # freed buffers of the other kind of work seldom fit
            mx.clear_cache()
        self._trained = training
        self._put_in(self._state.adapter)
        self._forward.train(training)
        try:
            with memory_guard(), mx.stream(self._mlx_device):
                yield
        finally:
            self._forward.train(False)
            self._put_in(self._state.adapter)  # and not the traced arrays, which hold a whole step's memory

    def _loss_and_grads(self, micro: Sequence[Batch], total: float, scale: float) -> tuple[float, Tensors]:
        """sum(weight x nll) / total over all micro-batches, and its gradient; one micro-batch in memory at a time.

        Both are `scale` times as large while they are computed.
        """
        loss = 0.0
        grads: Tensors = {}
        batches = (batch if self.shares_prefixes else joined(batch) for batch in numbered(micro))
        for part in (part for batch in batches for _, part in self._forward.parts(batch)):
            loss_of = partial(self._loss, part, self._forward.entering(part), total / scale)
            part_loss, part_grads = mx.value_and_grad(loss_of)(self._state.adapter)
            # a sum also of the first, since an array that came out of a trace may hold on to all that was traced; each
            # is taken out of its place, so that no gradient is held beside the sum that it is in
            grads = {name: part_grads.pop(name) / scale + grads.pop(name, 0.0) for name in self._state.adapter}
            mx.eval(part_loss, grads)
            loss += float(part_loss) / scale
        return loss, grads

    def _summed(self, team: Team, loss: float, grads: Tensors, lr: float) -> tuple[float, Tensors, float]:
        """Loss and gradients over all processes, and the step's rate."""
        own = grads or {name: mx.zeros_like(value) for name, value in self._state.adapter.items()}  # without rows
        (*summed, whole), lr = team.sum([*(own[name] for name in self._state.adapter), mx.array(loss)], lr)
        return float(whole), dict(zip(self._state.adapter, summed, strict=True)), lr

    def _loss(self, part: Batch, entering: mx.array | None, total: float, adapter: Tensors) -> mx.array:
        self._put_in(adapter)
        return self._forward.loss(self._state.step, part, entering, total)

    def _put_in(self, adapter: Tensors) -> None:
        self._held.put(adapter)
        if self._classes:
            self._forward.head.classes = adapter[HEAD_WEIGHT]
