"""transformers and bitsandbytes behind the contract of `interface.Session`: CUDA, MPS and CPU."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from backends.adapter_state import (
    NO_HEAD,
    NO_TEXT,
    adapted_modules,
    fitting,
    fitting_trained,
    magnitudes_of,
    trained_shapes,
    untrained,
)
from backends.config_sizes import answering_bytes
from backends.interface import (
    HEAD_WEIGHT,
    MAGNITUDE,
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
from backends.layer_names import matched
from backends.loss_scale import loss_scales
from backends.micro_batches import check_tokens, joined, own_part, total_of
from backends.model_folder import folder_of
from backends.predictions import FROZEN_BLOCKS, HEAD, LORA, SHARED_PREFIXES
from backends.sampling import check_prompts, room_for_answers
from backends.streaming import STREAMED, Advance, guarded
from backends.team import Team
from backends.torch_backend.costs import COSTS, KERNELS, RECOMPUTED
from backends.torch_backend.device import (
    bound_memory,
    device_kind,
    device_name,
    free_of,
    half_type,
    held_bytes,
    lacks_repeatable_kernel,
    memory_guard,
    pick_device,
    random_numbers,
    repeatable_kernels,
)
from backends.torch_backend.forward import Forward
from backends.torch_backend.fused import kernels_on
from backends.torch_backend.generate import generate
from backends.torch_backend.gradient import Gradient
from backends.torch_backend.lora import base_weight, join_weights
from backends.torch_backend.machine import describe as describe
from backends.torch_backend.machine import free_bytes as free_bytes
from backends.torch_backend.machine import probe as probe
from backends.torch_backend.machine import unused_accelerator as unused_accelerator
from backends.torch_backend.masks import Dropout
from backends.torch_backend.model import scheme_of
from backends.torch_backend.offload import keep_embedding_on_host
from backends.torch_backend.optim import AdamW
from backends.torch_backend.own_code import use_checked_own_code, use_own_code
from backends.torch_backend.recompute import recompute_blocks
from backends.torch_backend.score import last_states, scores_of
from backends.torch_backend.streamed import opened
from backends.torch_backend.trainable import check_whole, trained_weights
from backends.torch_backend.tree import check_experts, check_format, check_type, tree_of
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
    matched(tree_of(folder), folder.lora_modules(lora), "transformers", folder.path)
    check_experts(model, folder)


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> TorchSession:
    """Raises BackendError for a folder, targets or a quantisation that cannot be used."""
    return TorchSession(model, lora, optim, seed)


class TorchSession(Keeping):
    def __init__(self, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> None:
        self._device = pick_device(model.device)
        self.device = device_name(self._device)
        bound_memory(self._device)
        self.lora_shapes, self._shapes = adapted_modules(model, lora), trained_shapes(model, lora)
        self._lora, self._seed, self._classes = lora, seed, lora.classes
        if lora.whole:
            refuse_half(model, device_kind(self._device), half_type(self._device))
        self._dropout = Dropout(lora.dropout, seed, self.lora_shapes, self._device)
        costs = COSTS[device_kind(self._device)]
        self._number_type = model.number_type(device_kind(self._device), half_type(self._device))
        number = model.number_bytes(device_kind(self._device))
        self._answering = answering_bytes(folder_of(model).text_config, number)
        self._spec, self._tokens_at_once = model, costs.tokens_at_once or sys.maxsize
        with memory_guard(self._device), random_numbers(self._device, seed):
            self._model, self._streamed = opened(model, self._device, self.lora_shapes)
            self._adapter = trained_weights(self._model, model, lora, self._dropout)
            use_own = use_own_code if self._streamed else use_checked_own_code  # a check reads all blocks twice
            self._block_shortcuts = use_own(self._model)
            join_weights(self._model)
            if model.checkpointing:
                recompute_blocks(self._model, self._dropout, self._device)
                if self._streamed is None:
                    keep_embedding_on_host(self._model, self._device)
            if self._classes:
                head = torch.zeros(self._shapes[HEAD_WEIGHT], device=self._device)
                self._adapter[HEAD_WEIGHT] = torch.nn.Parameter(head)
            score = self._adapter.get(HEAD_WEIGHT)
            self._forward = Forward(
                self._model, self._device, costs.logits_at_once or sys.maxsize, score, self._streamed
            )
            if self._number_type == "float16":
                self._forward.check_range()
            self._frozen_kept = self._forward.keep_frozen_blocks()
        self.scheme = scheme_of(self._model)
        self._vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self._step = self._most_held = 0
        self.repeatable = True
        self.team: Team | None = None
        self._optimiser = AdamW(self._adapter, optim)
        lengths = {name: value for name, value in _arrays(self._adapter).items() if name.endswith(MAGNITUDE)}
        self._magnitudes = magnitudes_of({name.rpartition(".")[0]: value for name, value in lengths.items()})
        self.set_state(TrainState(0, self.untrained(), {}))

    @cached_property
    def shares_prefixes(self) -> bool:
        with memory_guard(self._device):
            return not self._spec.remote_code and self._forward.can_share_prefixes()

    @cached_property
    def shortcuts(self) -> tuple[str, ...]:
        shared = [SHARED_PREFIXES] if self.shares_prefixes else []
        frozen = [FROZEN_BLOCKS] if self._frozen_kept else []
        head = [HEAD] if self._forward.head.linear is not None else []
        again = [RECOMPUTED] if self._spec.checkpointing else []
        own = [] if self._lora.whole else [LORA]
        own += [KERNELS] if kernels_on(self._device, getattr(torch, self._number_type)) else []
        frozen += [STREAMED] if self._streamed else []
        return (*shared, *frozen, *head, *own, *self._block_shortcuts, *again)

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        total = total_of(micro, self.team.weight if self.team else total)
        check_tokens(micro, self._vocabulary, self._classes)
        for scale in loss_scales(self._number_type, total):
            loss, norm = self._repeatably_updated(micro, total, lr, scale)
            if np.isfinite(norm):
                break
        else:
            raise NonFinite(f"loss {loss}, gradient norm {norm} in step {self._step + 1}")
        self._step += 1
        return StepResult(loss, sum(int(np.count_nonzero(batch.weights)) for batch in micro), norm)

    def _repeatably_updated(self, micro: Sequence[Batch], total: float, lr: float, scale: float) -> tuple[float, float]:
        """As `_update`, with kernels that give the same bits every time, where each operation has one."""
        try:
            return self._update(micro, total, lr, scale)
        except RuntimeError as error:
            if not self.repeatable or not lacks_repeatable_kernel(error):
                raise
        self.repeatable = False
        return self._update(micro, total, lr, scale)

    def _update(self, micro: Sequence[Batch], total: float, lr: float, scale: float) -> tuple[float, float]:
        """The loss, and the gradient's norm; if either is not finite, nothing is updated."""
        with memory_guard(self._device), repeatable_kernels(self._device, self.repeatable):
            try:
                gradient = Gradient(self._forward, self._dropout, self._device, self._tokens_at_once)
                share = any(batch.prefixes for batch in micro) and self.shares_prefixes
                loss = gradient.add(self._step, micro, total / scale, share) / scale
                with torch.no_grad():
                    self._optimiser.divide_grads(scale)
                    if self.team:
                        loss, lr = self._optimiser.sum_grads(self.team, loss, lr)
                    return self._optimiser.update(self._step + 1, lr, loss)
            finally:  # before the guard gives free memory back to the device
                for tensor in self._adapter.values():
                    tensor.grad = None

    def score(self, batch: Batch) -> Scores:
        check_tokens([batch], self._vocabulary, self._classes)
        if batch.prefixes and not self.shares_prefixes:
            return own_part(self._score(joined(batch)), batch)
        return self._score(batch)

    def _score(self, batch: Batch) -> Scores:
        with memory_guard(self._device), torch.inference_mode():
            return scores_of(self._forward, batch, self._tokens_at_once)

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Advance]:
        return guarded(self._forward.read_ahead(batches), partial(memory_guard, self._device))

    def states(self, batch: Batch) -> FloatArray:
        if not self._classes:
            raise BackendError(NO_HEAD)
        check_tokens([batch], self._vocabulary, self._classes)
        with memory_guard(self._device), torch.inference_mode():
            return last_states(self._forward, batch, self.shares_prefixes, self._tokens_at_once)

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
        with memory_guard(self._device), torch.inference_mode():
            room = room_for_answers(self.free_bytes(), self._answering)
            return generate(self._forward, prompts, max_tokens, stop, temperature, seed, room)

    def base_weight(self, module: str) -> FloatArray:
        held = self._streamed.holding(module) if self._streamed else nullcontext()
        with memory_guard(self._device), torch.inference_mode(), held:
            return base_weight(self._model, module)

    def untrained(self) -> dict[str, FloatArray]:
        return untrained(self._spec, self._lora, self._seed, self._magnitudes)

    def trained(self) -> dict[str, FloatArray]:
        return _arrays(self._adapter)

    def set_trained(self, tensors: Mapping[str, FloatArray]) -> None:
        self._take(fitting_trained(tensors, self._shapes))

    def _take(self, fitted: Mapping[str, FloatArray]) -> None:
        with torch.no_grad():
            for name, tensor in self._adapter.items():
                tensor.copy_(torch.from_numpy(fitted[name]))

    def get_state(self) -> TrainState:
        return TrainState(self._step, self.trained(), _arrays(self._optimiser.moments))

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        self._take(state.adapter)
        with torch.no_grad():
            self._optimiser.set_moments(state.moments)
        self._step = state.step

    def peak_bytes(self) -> int:
        self._most_held = max(self._most_held, held_bytes(self._device))
        return self._most_held

    def free_bytes(self) -> int | None:
        return free_of(self._device)


def _arrays(tensors: dict[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in tensors.items()}
