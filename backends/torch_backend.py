"""transformers and bitsandbytes behind the contract of `interface.Session`: CUDA, MPS and CPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers

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
from backends.lora_init import initial_adapter
from backends.model_files import lora_modules
from backends.prefixes import joined, own_part
from backends.state import adapter_shapes, fitting
from backends.torch_attention import use_products
from backends.torch_device import (
    device_name,
    free_bytes,
    memory_guard,
    peak_bytes,
    pick_device,
    random_numbers,
    repeatable,
)
from backends.torch_forward import Forward
from backends.torch_layers import use_own_layers
from backends.torch_lora import Dropout, add_adapter
from backends.torch_model import load_frozen, scheme_of
from backends.torch_optim import AdamW


def probe() -> str | None:
    return None  # the imports above are all it takes; the registry reports one that fails


def describe() -> dict[str, Any]:
    device = pick_device("auto")
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    versions = {name: version(name) for name in packages if find_spec(name)}
    four_bit = "bitsandbytes" in versions and device.type != "mps"
    return {"device": device_name(device), "versions": versions, "4bit": four_bit, "checkpointing": True}


def open(model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> TorchSession:
    """Raises BackendError where the folder, its targets or the quantisation cannot be had."""
    return TorchSession(model, lora, optim, seed)


class TorchSession:
    shares_prefixes = False

    def __init__(self, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> None:
        self._device = pick_device(model.device)
        self.device = device_name(self._device)
        self.lora_shapes = lora_modules(model.path, lora, model.remote_code)
        self._shapes = adapter_shapes(self.lora_shapes, lora.rank)
        self._dropout = Dropout(lora.dropout, seed)
        with memory_guard(self._device), random_numbers(self._device, seed):
            self._model = load_frozen(model, self._device)
            self._adapter = add_adapter(self._model, self.lora_shapes, lora, self._dropout)
            use_own_layers(self._model)
            use_products(self._model)
            self._forward = Forward(self._model, self._device)
            if lora.layers is not None and not model.checkpointing:
                self._forward.keep_frozen_blocks()
        self.scheme = scheme_of(self._model)
        self._checkpointing = model.checkpointing
        self._step = 0
        self._optimiser = AdamW(self._adapter, optim)
        self.set_state(TrainState(0, initial_adapter(self.lora_shapes, lora.rank, seed), {}))

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
        return own_part(self._score(joined(batch)), batch)

    def _score(self, batch: Batch) -> Scores:
        where = np.flatnonzero(batch.weights)
        logprob = np.zeros(batch.weights.size, np.float32)
        greedy = np.zeros(batch.weights.size, np.int32)
        if where.size:
            with memory_guard(self._device), torch.inference_mode():
                states = self._forward.states(batch, where)  # [N, D]
                found, best = self._forward.head.score(states, self._targets(batch, where))
                logprob[where], greedy[where] = found.cpu().numpy(), best.cpu().numpy()
        return Scores(logprob.reshape(batch.weights.shape), greedy.reshape(batch.weights.shape))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        if not prompts or max_tokens < 1:
            return [[] for _ in prompts]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config = transformers.GenerationConfig(
            max_new_tokens=max_tokens, eos_token_id=sorted(stop) or None, pad_token_id=0, use_cache=True, **sampling
        )
        with memory_guard(self._device), random_numbers(self._device, seed), torch.inference_mode():
            output = self._model.generate(
                ids.to(self._device), attention_mask=mask.to(self._device), generation_config=config
            )
        return [_until(row, stop) for row in output[:, width:].tolist()]

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
        loss = torch.zeros((), device=self._device)
        self._model.train(self._checkpointing)  # blocks are recomputed in training mode alone
        try:
            for index, batch in enumerate(map(joined, micro)):
                where = np.flatnonzero(batch.weights)
                if not where.size:
                    continue
                self._dropout.place = (self._step, index)
                states = self._forward.states(batch, where)  # [N, D]
                shares = torch.from_numpy(batch.weights.reshape(-1)[where] / np.float32(total)).to(self._device)
                part, gradient = self._forward.head.loss(states, self._targets(batch, where), shares)
                states.backward(gradient)
                loss += part
        finally:
            self._dropout.place = None
            self._model.eval()
        return float(loss)

    def _targets(self, batch: Batch, where: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(batch.targets.reshape(-1)[where].astype(np.int64)).to(self._device)


def _arrays(tensors: dict[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in tensors.items()}


def _until(tokens: list[int], stop: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
