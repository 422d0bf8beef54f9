"""What a torch step keeps, and computes again: counted at large shapes, and the same to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.dropout import places
from backends.interface import LoraSpec
from backends.predictions import Architecture
from backends.torch_backend import device as torch_device
from backends.torch_backend import optim as torch_optim
from backends.torch_backend.costs import saved
from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.masks import Dropout
from tests.benchmarks.kept import SHAPES, per_block
from tests.conformance.toy import identical, prefixed, random_adapter, toy_batch
from tests.tiny_models import family, tiny_llama
from tests.unit.test_torch_backend import opened

BATCH, OTHER = toy_batch(), toy_batch(seed=1)
DROPPING = LoraSpec(4, 8.0, dropout=0.3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


# --- what is kept -------------------------------------------------------------------------------


def predicted(config: Any, lora: LoraSpec) -> float:
    """By the forecast, per token and block, in bfloat16."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    parts = ["qkv_proj"], ["gate_up_proj"]
    if config.model_type != "phi3":
        parts = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    leaves = [*parts[0], "o_proj", *parts[1], "down_proj"]
    modules = {f"layers.0.{leaf}": (1, 1) for leaf in leaves}
    sizes = (config.hidden_size, config.intermediate_size, queries, keys)
    kind = config.model_type
    shape = Architecture(
        1, *sizes, 1, modules, 0, 0, 2, False, kind not in ("llama", "phi3"), norms_after=kind == "gemma3_text"
    )
    return saved(shape, modules, lora, 2)


@pytest.mark.parametrize(
    ("name", "dropout"), [("Llama 8B", 0.05), ("Qwen3 4B", 0.0), ("Gemma 3 4B", 0.0), ("Phi-4 mini", 0.0)]
)
def test_the_forecast_counts_what_a_block_keeps(name: str, dropout: float) -> None:
    lora = LoraSpec(16, 32.0, dropout=dropout)
    found = per_block(SHAPES[name], 512, lora)
    assert found.kept == pytest.approx(predicted(SHAPES[name], lora), rel=0.01)


def test_a_block_that_is_computed_again_keeps_its_input() -> None:
    config = SHAPES["Llama 8B"]
    found = per_block(config, 512, LoraSpec(16, 32.0, dropout=0.05), recompute=True)
    assert found.kept == pytest.approx(2 * config.hidden_size, rel=0.01)


# --- blocks computed again ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "layers"),
    [
        ("llama", "float32", None),
        ("llama", "bfloat16", 1),
        ("gemma2", "float32", None),
        pytest.param("qwen3", "bfloat16", None, marks=pytest.mark.slow),
        pytest.param("phi3", "float32", None, marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_no_byte(name: str, dtype: str, layers: int | None, tmp_path: Path) -> None:
    folder, lora = family(name, tmp_path), replace(DROPPING, layers=layers)
    kept, again = (opened(folder, lora, dtype=dtype, checkpointing=flag) for flag in (False, True))
    for micro in ([BATCH, OTHER], [prefixed(), prefixed(), OTHER]):
        assert kept.step(micro, 1e-2) == again.step(micro, 1e-2)
    identical(kept.get_state(), again.get_state())


def test_recomputation_keeps_what_else_saves_work(llama: Path) -> None:
    assert opened(llama, checkpointing=True).shares_prefixes
    assert opened(llama, LoraSpec(4, 8.0, layers=1), checkpointing=True)._forward.frozen is not None


def test_the_product_that_ends_a_block_is_not_computed_again(llama: Path) -> None:
    session = opened(llama, checkpointing=True)
    products = dict.fromkeys(("gate_proj", "down_proj"), 0)
    for name in products:
        base = getattr(session._model.model.layers[0].mlp, name).base

        def counted(*_: Any, name: str = name) -> None:
            products[name] += 1

        base.register_forward_pre_hook(counted)
    session.step([BATCH], 1e-2)
    assert products == {"gate_proj": 2, "down_proj": 1}
    assert not any(layer.unused for layer in session._model.modules() if isinstance(layer, LoraLinear))


# --- the adapter in the type of the computation --------------------------------------------------


def test_the_adapter_is_cast_after_each_change_and_not_in_between(llama: Path) -> None:
    session = opened(llama, dtype="bfloat16")
    layer = next(layer for layer in session._model.modules() if isinstance(layer, LoraLinear))
    session.score(BATCH)
    whole, _, b = layer.siblings.factors(torch.bfloat16)
    session.generate([[5, 6]], 2, ())
    assert layer.siblings.factors(torch.bfloat16)[0] is whole
    session.step([BATCH], 1e-2)
    after = layer.siblings.factors(torch.bfloat16)
    assert torch.equal(after[0][: len(layer.lora_A)], layer.lora_A.bfloat16()) and not torch.equal(after[2][0], b[0])
    session.set_state(random_adapter(session))
    assert torch.equal(layer.siblings.factors(torch.bfloat16)[2][0], layer.lora_B.bfloat16())


# --- the update ---------------------------------------------------------------------------------


def test_an_update_in_groups_changes_no_byte_and_no_array_of_the_caller(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, grouped = opened(llama), opened(llama)
    for _ in range(2):
        expected = whole.step([BATCH], 1e-2)
        monkeypatch.setattr(torch_optim, "_NUMBERS", 100)
        assert grouped.step([BATCH], 1e-2) == expected
        monkeypatch.undo()
    identical(whole.get_state(), grouped.get_state())
    state = whole.get_state()
    copies = {name: value.copy() for name, value in state.moments.items()}
    whole.set_state(state)
    whole.step([OTHER], 1e-2)
    assert all(np.array_equal(state.moments[name], value) for name, value in copies.items())


# --- waits --------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Counts what a GPU's host would wait for: numbers read, and tensors made anew of the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::unique2"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def waits(session: Any, micro: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with monkeypatch.context() as patch, Waits() as counted:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            method = getattr(torch.Tensor, name)

            def noting(tensor: Any, *args: Any, name: str = name, method: Any = method) -> Any:
                counted.seen.append(name)
                return method(tensor, *args)

            patch.setattr(torch.Tensor, name, noting)
        session.step(micro, 1e-2)
    return counted.seen


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_waits_once_however_many_micro_batches_it_has(
    dropout: float, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(llama, LoraSpec(4, 8.0, dropout=dropout))
    assert session.shares_prefixes  # asked for now: it is found out by passes of its own
    assert waits(session, [BATCH], monkeypatch) == ["tolist"]
    assert waits(session, [BATCH, OTHER, BATCH], monkeypatch) == ["tolist"]
    again = opened(llama, LoraSpec(4, 8.0, dropout=dropout), checkpointing=True)
    assert waits(again, [BATCH, OTHER], monkeypatch) == ["tolist"]


def test_a_wait_is_seen(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(llama)
    norm = session._model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, out: print(bool(out.sum().isfinite())))
    assert len(waits(session, [BATCH, OTHER], monkeypatch)) > 2


def test_arrays_reach_the_device_in_one_piece_as_they_are() -> None:
    random = np.random.default_rng(0)
    arrays = [
        random.integers(-9, 9, (3, 5)), random.random(7).astype(np.float32), np.zeros(0, np.int64),
        random.integers(0, 9, 1).astype(np.int32), random.integers(0, 255, (2, 1, 3)).astype(np.uint8),
    ]  # fmt: skip
    packed = torch.from_numpy(torch_device.packed_bytes(arrays).copy())
    assert packed.dtype == torch.uint8
    for tensor, array in zip(torch_device.unpacked(packed, arrays), arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
    for tensor, array in zip(torch_device.uploaded(arrays, torch.device("cpu")), arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)


def test_dropout_keeps_a_word_per_token_and_draws_the_same_mask_again() -> None:
    dropout = Dropout(0.4, 3, {"a": (8, 64)}, torch.device("cpu"))
    dropout.at(2, places([0], np.zeros(1, int), 10, 0))
    mask: Any = dropout.mask(0, torch.zeros(10, 64))
    first, keys = mask.drawn(), dropout.keys
    dropout.at(5, places([1], np.zeros(1, int), 4, 0))
    assert torch.equal(mask.drawn(), first) and 0.4 < first.float().mean() < 0.8
    with dropout.as_of(keys):
        again: Any = dropout.mask(0, torch.zeros(10, 64))
    assert torch.equal(again.drawn(), first)
    other: Any = dropout.mask(0, torch.zeros(4, 64))
    assert not torch.equal(other.drawn(), first[:4])
