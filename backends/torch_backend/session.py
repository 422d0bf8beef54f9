"""transformers and bitsandbytes behind the contract of `interface.Session`: CUDA, MPS and CPU."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count, groupby
from typing import Any

import numpy as np
import torch

from backends.adapter_state import adapter_shapes, fitting, initial_adapter
from backends.interface import (
    Batch,
    LoraSpec,
    ModelSpec,
    NonFinite,
    OptimSpec,
    Scores,
    StepResult,
    TrainState,
)
from backends.micro_batches import CPU_TOKENS, joined, own_part, parts
from backends.model_folder import folder_of
from backends.torch_backend.attention import use_products
from backends.torch_backend.device import (
    device_name,
    free_bytes,
    memory_guard,
    peak_bytes,
    pick_device,
    random_numbers,
    repeatable,
)
from backends.torch_backend.forward import Forward
from backends.torch_backend.generate import generate
from backends.torch_backend.layers import use_own_layers
from backends.torch_backend.lora import Dropout, add_adapter
from backends.torch_backend.model import load_frozen, scheme_of
from backends.torch_backend.optim import AdamW
from backends.torch_backend.prefix import Start


def probe() -> str | None:
    return None  # the imports above are all it takes; the registry reports one that fails


def describe() -> dict[str, Any]:
    device = pick_device("auto")
    packages = ("torch", "transformers", "bitsandbytes", "accelerate")
    versions = {name: version(name) for name in packages if find_spec(name)}
    four_bit = "bitsandbytes" in versions and device.type != "mps"
    return {"device": device_name(device), "versions": versions, "4bit": four_bit, "checkpointing": True}


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> TorchSession:
    """Raises BackendError where the folder, its targets or the quantisation cannot be had."""
    return TorchSession(model, lora, optim, seed)


class TorchSession:
    def __init__(self, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> None:
        self._device = pick_device(model.device)
        self.device = device_name(self._device)
        self.lora_shapes = folder_of(model).lora_modules(lora)
        self._shapes = adapter_shapes(self.lora_shapes, lora.rank)
        self._dropout = Dropout(lora.dropout, seed)
        with memory_guard(self._device), random_numbers(self._device, seed):
            self._model = load_frozen(model, self._device)
            self._adapter = add_adapter(self._model, self.lora_shapes, lora, self._dropout)
            use_own_layers(self._model)
            use_products(self._model)
            self._forward = Forward(self._model, self._device)
            if not model.checkpointing:
                self._forward.shorten_last_block()
                self._forward.keep_frozen_blocks()
        self.scheme = scheme_of(self._model)
        self._spec = model
        self._tokens = CPU_TOKENS["torch"] if self._device.type == "cpu" else sys.maxsize  # computed at a time
        self._step = 0
        self._optimiser = AdamW(self._adapter, optim)
        self.set_state(TrainState(0, initial_adapter(self.lora_shapes, lora.rank, seed), {}))

    @cached_property
    def shares_prefixes(self) -> bool:
        with memory_guard(self._device):
            return not self._spec.checkpointing and not self._spec.remote_code and self._forward.can_share()

    def step(self, micro: Sequence[Batch], lr: float) -> StepResult:
        total = float(sum(np.sum(batch.weights, dtype=np.float64) for batch in micro))
        if not total > 0:
            raise ValueError("nothing is supervised in this step: all weights are 0")
        try:
            with memory_guard(self._device), repeatable(self._device):
                loss = self._backward(micro, total)
                with torch.no_grad():
                    norm = self._optimiser.update(self._step + 1, lr) if np.isfinite(loss) else float("nan")
        finally:
            for tensor in self._adapter.values():
                tensor.grad = None
        if not np.isfinite(norm):
            raise NonFinite(f"loss {loss}, gradient norm {norm} in step {self._step + 1}")
        self._step += 1
        return StepResult(loss, sum(int(np.count_nonzero(batch.weights)) for batch in micro), norm)

    def score(self, batch: Batch) -> Scores:
        if batch.prefixes and not self.shares_prefixes:
            return own_part(self._score(joined(batch)), batch)
        return self._score(batch)

    def _score(self, batch: Batch) -> Scores:
        logprob = np.zeros(batch.weights.shape, np.float32)
        greedy = np.zeros(batch.weights.shape, np.int32)
        with memory_guard(self._device), torch.inference_mode():
            start = self._forward.start(batch.prefixes) if batch.prefixes else None
            for rows, part in parts(batch, self._tokens):
                where = np.nonzero(part.weights)
                states = self._forward.states(part, start)  # [N, D]
                found, best = self._forward.head.score(states, self._tensor(part.targets[where].astype(np.int64)))
                place = rows[where[0]], where[1]
                logprob[place], greedy[place] = found.cpu().numpy(), best.cpu().numpy()
        return Scores(logprob, greedy)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        with memory_guard(self._device), torch.inference_mode():
            return generate(self._forward, prompts, max_tokens, stop, temperature, seed)

    def get_state(self) -> TrainState:
        return TrainState(self._step, _arrays(self._adapter), _arrays(self._optimiser.moments))

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        with torch.no_grad():
            for name, tensor in self._adapter.items():
                tensor.copy_(torch.from_numpy(state.adapter[name]))
        moments = {name: torch.from_numpy(value).to(self._device) for name, value in state.moments.items()}
        self._optimiser.moments = moments
        self._step = state.step

    def peak_bytes(self) -> int:
        return peak_bytes(self._device)

    def free_bytes(self) -> int | None:
        return free_bytes(self._device)

    def _backward(self, micro: Sequence[Batch], total: float) -> float:
        """Adds the gradient of sum(w * nll) / total to every adapter tensor and returns that loss."""
        loss, together = torch.zeros((), device=self._device), list(self._together(micro))
        places = ((self._step, index) for index in count())
        self._model.train(self._spec.checkpointing)  # blocks are recomputed in training mode alone
        try:
            for batches in together:
                self._dropout.place = next(places)
                start = self._forward.start(batches[0].prefixes) if batches[0].prefixes else None
                for part in (part for batch in batches for _, part in parts(batch, self._tokens)):
                    self._dropout.place = next(places)
                    loss += self._backward_part(part, start, total)
                if start:
                    start.backward()
        finally:
            self._dropout.place = None
            self._model.eval()
        return float(loss)

    def _backward_part(self, batch: Batch, start: Start | None, total: float) -> torch.Tensor:
        states, own = self._forward.states(batch, start), batch.weights != 0  # [N, D]
        targets, shares = batch.targets[own].astype(np.int64), batch.weights[own] / np.float32(total)
        loss, gradient = self._forward.head.loss(states, self._tensor(targets), self._tensor(shares))
        states.backward(gradient)
        return loss

    def _together(self, micro: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Micro-batches that follow one another and have the same prefixes, which are then computed once for all."""
        batches = (batch if not batch.prefixes or self.shares_prefixes else joined(batch) for batch in micro)
        for _, same in groupby(batches, lambda batch: [prefix.tobytes() for prefix in batch.prefixes]):
            yield list(same)

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _arrays(tensors: dict[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in tensors.items()}
