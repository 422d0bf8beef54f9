"""transformers, PEFT and bitsandbytes behind the contract of `interface.Session`: CUDA, MPS and CPU."""

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
from backends.torch_device import (
    device_name,
    free_bytes,
    memory_guard,
    peak_bytes,
    pick_device,
    random_numbers,
    repeatable,
)
from backends.torch_model import add_adapter, load_frozen, scheme_of


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
        self._optim, self._seed = optim, seed
        self.device = device_name(self._device)
        self.lora_shapes = lora_modules(model.path, lora, model.remote_code)
        self._shapes = adapter_shapes(self.lora_shapes, lora.rank)
        with memory_guard(self._device), random_numbers(self._device, seed):
            self._model = load_frozen(model, self._device)
            self._adapter = add_adapter(self._model, self.lora_shapes, lora)
        self.scheme = scheme_of(self._model)
        self._selected: torch.Tensor | None = None  # [N] flat supervised positions, while logits are computed
        self._model.get_output_embeddings().register_forward_pre_hook(self._select)
        self._step = 0
        self._moments: dict[str, torch.Tensor] = {}
        self.set_state(TrainState(0, initial_adapter(self.lora_shapes, lora.rank, seed), {}))

    def step(self, micro: Sequence[Batch], lr: float) -> StepResult:
        total = float(sum(np.sum(batch.weights, dtype=np.float64) for batch in micro))
        if not total > 0:
            raise ValueError("nothing is supervised in this step: all weights are 0")
        try:
            with memory_guard(self._device), repeatable(self._device):
                loss = self._backward(micro, total)
                with torch.no_grad():
                    norm = self._update(lr) if np.isfinite(loss) else float("nan")
        finally:
            for tensor in self._adapter.values():
                tensor.grad = None
        if not np.isfinite(norm):
            raise NonFinite(f"loss {loss}, gradient norm {norm} in step {self._step + 1}")
        return StepResult(loss, sum(int(np.count_nonzero(batch.weights)) for batch in micro), norm)

    def score(self, batch: Batch) -> Scores:
        return own_part(self._score(joined(batch)), batch)

    def _score(self, batch: Batch) -> Scores:
        where = np.flatnonzero(batch.weights)
        logprob = np.zeros(batch.weights.size, np.float32)
        greedy = np.zeros(batch.weights.size, np.int32)
        if where.size:
            with memory_guard(self._device), torch.inference_mode():
                logits = self._logits(batch, where)  # [N, V]
                nll = torch.nn.functional.cross_entropy(logits, self._targets(batch, where), reduction="none")
                logprob[where] = -nll.cpu().numpy()
                greedy[where] = logits.argmax(-1).cpu().numpy()
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
        return TrainState(self._step, _arrays(self._adapter), _arrays(self._moments))

    def set_state(self, state: TrainState) -> None:
        state = fitting(state, self._shapes)
        with torch.no_grad():
            for name, tensor in self._adapter.items():
                tensor.copy_(torch.from_numpy(state.adapter[name]))
        self._moments = {name: torch.from_numpy(value).to(self._device) for name, value in state.moments.items()}
        self._step = state.step

    def peak_bytes(self) -> int:
        return peak_bytes(self._device)

    def free_bytes(self) -> int | None:
        return free_bytes(self._device)

    def _backward(self, micro: Sequence[Batch], total: float) -> float:
        """Adds the gradient of sum(w * nll) / total to every adapter tensor and returns that loss."""
        loss = torch.zeros((), device=self._device)
        self._model.train()
        try:
            for index, batch in enumerate(map(joined, micro)):
                where = np.flatnonzero(batch.weights)
                if not where.size:
                    continue
                with random_numbers(self._device, self._seed, self._step, index):
                    logits = self._logits(batch, where)  # [N, V]
                    nll = torch.nn.functional.cross_entropy(logits, self._targets(batch, where), reduction="none")
                    weights = torch.from_numpy(batch.weights.reshape(-1)[where]).to(self._device)
                    part = (weights * nll).sum() / total
                    part.backward()
                loss += part.detach()
        finally:
            self._model.eval()
        return float(loss)

    def _update(self, lr: float) -> float:
        """The update of `reference.clipped` and `reference.adamw`; assigned only if every number in it is finite."""
        names = list(self._adapter)
        weights = [self._adapter[name] for name in names]
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        clip = self._optim.clip_norm
        if clip is not None and norm > clip:
            grads = torch._foreach_mul(grads, clip / (norm + 1e-6))
        (beta1, beta2), number = self._optim.betas, self._step + 1
        first = [self._moments[f"{name}.exp_avg"] * beta1 for name in names]
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        second = [self._moments[f"{name}.exp_avg_sq"] * beta2 for name in names]
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        mean = torch._foreach_div(first, 1 - beta1**number)
        below = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**number))
        torch._foreach_add_(below, self._optim.eps)
        updated = torch._foreach_mul(weights, 1 - lr * self._optim.weight_decay)
        torch._foreach_addcdiv_(updated, mean, below, -lr)
        if not np.isfinite(norm) or not torch.stack([tensor.isfinite().all() for tensor in updated]).all():
            return float("nan")
        torch._foreach_copy_(weights, updated)
        for name, m, v in zip(names, first, second, strict=True):
            self._moments[f"{name}.exp_avg"], self._moments[f"{name}.exp_avg_sq"] = m, v
        self._step = number
        return norm

    def _logits(self, batch: Batch, where: np.ndarray[Any, Any]) -> torch.Tensor:
        """Float32 logits at the flat positions `where`. [N, V]

        Rows are padded on the right and attention is causal, so no supervised position sees padding.
        """
        self._selected = torch.from_numpy(where).to(self._device)
        try:
            ids = torch.from_numpy(np.ascontiguousarray(batch.inputs, dtype=np.int64)).to(self._device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
            if logits.ndim == 3:  # an architecture whose head the hook did not reach
                logits = logits.flatten(0, 1)[self._selected]
            return logits.float()
        finally:
            self._selected = None

    def _select(self, _head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the output head: keep the hidden states of supervised positions. [B, T, D] -> [N, D]"""
        if self._selected is None or not args:
            return None
        return (args[0].flatten(0, 1)[self._selected], *args[1:])

    def _targets(self, batch: Batch, where: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(batch.targets.reshape(-1)[where].astype(np.int64)).to(self._device)


def _arrays(tensors: dict[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in tensors.items()}


def _until(tokens: list[int], stop: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
