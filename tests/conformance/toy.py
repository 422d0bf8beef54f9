"""What the checks work with: a case (how to open a session), toy batches, random adapters, comparisons."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from backends import registry
from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec, Session, TrainState

VOCABULARY = 128
LORA = LoraSpec(rank=4, alpha=8.0)
DROPPING = replace(LORA, dropout=0.3)
OPTIM = OptimSpec(eps=1e-2)  # a large epsilon keeps the update smooth where a gradient is almost nothing

# MLX as a Mac runs it: on a Linux CPU its products otherwise go over a bridge to numpy's BLAS.
MLX_PLAIN = "mlx-plain"
BACKENDS = [*registry.NAMES, *([MLX_PLAIN] if sys.platform == "linux" else [])]
REAL_BACKENDS = [name for name in BACKENDS if name != "reference"]


def registered(backend: str) -> str:
    """The name that the registry knows."""
    return "mlx" if backend == MLX_PLAIN else backend


def without_bridge(backend: str) -> AbstractContextManager[Any]:
    """In here a session of `mlx-plain` is to be opened; for the other backends, nothing changes."""
    if backend != MLX_PLAIN:
        return nullcontext()
    from backends.mlx_backend import blas_bridge

    return mock.patch.object(blas_bridge, "ENABLED", False)


@dataclass(frozen=True)
class Case:
    """One of BACKENDS with one way of holding the base; float32 unless a check says otherwise."""

    backend: str
    folder: Path
    quantize: str = "none"

    def open(self, lora: LoraSpec = LORA, optim: OptimSpec = OPTIM, seed: int = 0, **spec: Any) -> Session:
        settings: dict[str, Any] = {"quantize": self.quantize, "dtype": "float32", "device": self._device} | spec
        with without_bridge(self.backend):
            return registry.open_session(
                registered(self.backend), ModelSpec(self.folder, **settings), lora, optim, seed
            )

    @property
    def _device(self) -> str:
        """The CPU for torch on a Mac: on its GPU torch has no 4-bit, and rounds otherwise."""
        return "cpu" if self.backend == "torch" and sys.platform == "darwin" else "auto"


def toy_batch(rows: int = 5, width: int = 10, seed: int = 0) -> Batch:
    """Rows of unequal length, each an unsupervised start and a supervised rest; some weights are a half. [B, T]"""
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(99).permutation(VOCABULARY)  # one rule for all: a token and what comes after it
    tokens = np.zeros((rows, width + 1), np.int32)
    weights = np.zeros((rows, width), np.float32)
    for row in range(rows):
        length = width - row % 4
        tokens[row, 0] = rng.integers(VOCABULARY)
        for place in range(length):
            tokens[row, place + 1] = follows[tokens[row, place]]
        weights[row, 2 + row % 3 : length] = rng.choice([0.5, 1.0], length - 2 - row % 3)
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), weights)


def prefixed() -> Batch:
    """Five rows that go on from two prefixes of unequal length. [5, T]"""
    batch, rng = toy_batch(), np.random.default_rng(3)
    long, short = (rng.integers(0, VOCABULARY, length).astype(np.int32) for length in (11, 6))
    return replace(batch, prefixes=(long, short), prefix_of=(0, 1, 0, 0, 1))


def part(batch: Batch, *rows: int) -> Batch:
    """Some rows, which keep the numbers that they have in the whole batch."""
    chosen = list(rows)
    return Batch(batch.inputs[chosen], batch.targets[chosen], batch.weights[chosen], rows=rows)


def padded(batch: Batch, columns: int) -> Batch:
    """The batch with `columns` more of rubbish on the right and two rows of rubbish below, all of weight 0."""
    rng = np.random.default_rng(7)
    rows, width = batch.inputs.shape

    def grown(old: np.ndarray) -> np.ndarray:
        new = rng.integers(0, VOCABULARY, (rows + 2, width + columns)).astype(np.int32)
        new[:rows, :width] = old
        return new

    weights = np.zeros((rows + 2, width + columns), np.float32)
    weights[:rows, :width] = batch.weights
    numbers = (*batch.rows, 90, 91) if batch.rows else ()
    return Batch(grown(batch.inputs), grown(batch.targets), weights, rows=numbers)


def random_adapter(session: Session, seed: int = 1, size: float = 0.1) -> TrainState:
    """A state in which A and B both matter, as if training had begun long ago."""
    rng = np.random.default_rng(seed)
    adapter = session.get_state().adapter
    return TrainState(0, {n: (rng.standard_normal(v.shape) * size).astype(np.float32) for n, v in adapter.items()}, {})


def without_b(state: TrainState) -> TrainState:
    adapter = {name: value * 0 if name.endswith("lora_B") else value for name, value in state.adapter.items()}
    return TrainState(0, adapter, {})


def begun(case: Case, **settings: Any) -> Session:
    """A session whose adapter is random and not zero."""
    session = case.open(**settings)
    session.set_state(random_adapter(session))
    return session


def mean_nll(session: Session, batch: Batch) -> float:
    return float(-(session.score(batch).logprob * batch.weights).sum(dtype=np.float64) / batch.weights.sum())


def identical(one: TrainState, other: TrainState) -> None:
    assert one.step == other.step
    for kind in ("adapter", "moments"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].tobytes() == theirs[name].tobytes(), f"{name} differs"


def differ(one: TrainState, other: TrainState) -> bool:
    return any(not np.array_equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


def close(one: TrainState, other: TrainState, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` of each tensor's largest number."""
    assert one.step == other.step
    for kind in ("adapter", "moments"):
        for name, value in getattr(one, kind).items():
            expected = getattr(other, kind)[name]
            limit = tolerance * max(float(np.abs(expected).max()), 1e-12)
            assert np.abs(value - expected).max() <= limit, f"{name} differs by {np.abs(value - expected).max()}"


def taken_away(weights: Mapping[str, np.ndarray]) -> TrainState:
    """The adapter of rank 64 and scale 1 that is minus these weights [out, in], the smaller of whose sides is 64."""
    adapter = {}
    for module, weight in weights.items():
        tall = weight.shape[0] > weight.shape[1]
        adapter[f"{module}.lora_A"] = np.eye(64, dtype=np.float32) if tall else grown(-weight, (64, weight.shape[1]))
        adapter[f"{module}.lora_B"] = -weight if tall else grown(np.eye(len(weight)), (len(weight), 64))
    return TrainState(0, adapter, {})


def grown(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """With zeros on the right and below."""
    return np.pad(matrix, [(0, new - old) for old, new in zip(matrix.shape, shape, strict=True)]).astype(np.float32)


def without_layers(case: Case) -> np.ndarray:
    """Log-probabilities [V, V] of the token after each, by a tiny Llama (or the reference) whose blocks do nothing."""
    if case.backend == "reference":
        return np.full((VOCABULARY, VOCABULARY), -np.log(VOCABULARY))
    tensors = load_file(case.folder / "model.safetensors")
    states = tensors["model.embed_tokens.weight"].astype(np.float64)
    states /= np.sqrt(np.square(states).mean(-1, keepdims=True) + 1e-6)
    logits = states * tensors["model.norm.weight"] @ tensors["lm_head.weight"].T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
