"""What is the torch backend's own: folders it refuses, memory that runs out, 4-bit as it really is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import BackendError, LoraSpec, OutOfMemory
from tests.conformance.toy import Case, begun, close, identical, toy_batch

if registry.probe("torch") is not None:
    pytest.skip("torch is not usable here", allow_module_level=True)

import torch
from safetensors.numpy import load_file, save_file

from backends.torch_backend import forward as torch_forward
from backends.torch_backend.head import Head
from tests.tiny_models import tiny_llama

BATCH = toy_batch()


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def rewrite(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (
            {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}},
            "mlx-lm",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ],
)
def test_a_quantised_folder_is_refused(copy: Path, keys: dict[str, Any], kind: str) -> None:
    rewrite(copy, **keys)
    with pytest.raises(BackendError, match=f"already quantised by {kind}"):
        Case("torch", copy).open()


def test_missing_weights_are_an_error_and_not_random_numbers(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendError, match=r"model\.norm\.weight"):
        Case("torch", copy).open()


def test_a_truncated_file_is_an_error(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BackendError, match=r"model\.safetensors"):
        Case("torch", copy).open()


def test_an_unknown_architecture_is_an_error(copy: Path) -> None:
    rewrite(copy, model_type="no_such_model", architectures=["NoSuchModel"])
    with pytest.raises(BackendError, match="no_such_model"):
        Case("torch", copy).open()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_leaves_the_state(
    error: Exception, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("torch", tiny_folder))
    session.step([BATCH], 1e-2)
    before, forward, calls = session.get_state(), session._forward._states_at, []

    def fails_second(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise error
        return forward(*given)

    monkeypatch.setattr(session._forward, "_states_at", fails_second)
    with pytest.raises(OutOfMemory):
        session.step([BATCH, BATCH], 1e-2)
    with pytest.raises(OutOfMemory):
        session.score(BATCH)
    monkeypatch.undo()
    identical(session.get_state(), before)
    expected = begun(Case("torch", tiny_folder))
    expected.step([BATCH], 1e-2)
    assert session.step([BATCH], 1e-2) == expected.step([BATCH], 1e-2)  # no gradient is left over


def test_other_runtime_errors_are_not_hidden(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = begun(Case("torch", tiny_folder))

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(session._forward, "_states_at", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        session.step([BATCH], 1e-2)


def test_nothing_is_sent_to_the_device_for_a_token_that_the_model_does_not_have(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA such a token is an assertion on the device, after which the process cannot use it."""
    session: Any = begun(Case("torch", tiny_folder))
    sent: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda *arguments, **_: sent.append(arguments))
    bad = replace(BATCH, inputs=BATCH.inputs + 128)
    calls: list[Any] = [lambda: session.step([bad], 1e-2), lambda: session.score(bad)]
    for call in (*calls, lambda: session.generate([[128]], 1, ())):
        with pytest.raises(ValueError, match="vocabulary of 128"):
            call()
    assert not sent


def test_4bit_is_nf4_even_where_the_width_is_no_multiple_of_the_block(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "odd", intermediate_size=172)
    session = begun(Case("torch", folder, "4bit"))
    assert session.scheme == "nf4/64 double"
    exact = begun(Case("torch", folder))
    difference = np.abs(session.score(BATCH).logprob - exact.score(BATCH).logprob).max()
    assert 1e-3 < difference < 2
    assert np.isfinite(session.step([BATCH], 1e-2).loss)


def test_dtypes_and_the_device_that_is_asked_for(tiny_folder: Path) -> None:
    session: Any = Case("torch", tiny_folder).open(device="cpu", dtype="auto")
    assert session.device == "cpu"
    assert session._model.model.embed_tokens.weight.dtype == torch.float32
    half: Any = Case("torch", tiny_folder).open(device="cpu", dtype="bfloat16")
    assert half._model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in half._adapter.values()} == {torch.float32}
    assert half.step([BATCH], 1e-2).loss == pytest.approx(session.step([BATCH], 1e-2).loss, rel=0.02)


@pytest.mark.parametrize("plain", [True, False])
def test_only_supervised_positions_reach_the_output_head(
    plain: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not plain:  # as of an architecture that does more after its head than is known here
        monkeypatch.setattr(torch_forward, "find_head", lambda model, logits_at_once: Head(None, logits_at_once))
    session: Any = begun(Case("torch", tiny_folder))
    seen: list[int] = []
    session._model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[:-1].numel()))
    scores, result = session.score(BATCH), session.step([BATCH], 1e-2)
    assert seen == [int(np.count_nonzero(BATCH.weights))] * 2
    monkeypatch.undo()
    expected = begun(Case("torch", tiny_folder))
    np.testing.assert_allclose(scores.logprob, expected.score(BATCH).logprob, atol=1e-5)
    assert result.loss == pytest.approx(expected.step([BATCH], 1e-2).loss, rel=1e-5)
    close(session.get_state(), expected.get_state())


def test_the_models_own_dropout_is_off(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dropping", attention_dropout=0.5)
    losses = [Case("torch", folder).open(LoraSpec(4, 8.0), seed=seed).step([BATCH], 1e-2).loss for seed in (0, 1)]
    assert losses[0] == losses[1]


def test_the_process_keeps_its_random_numbers_and_verbosity(tiny_folder: Path) -> None:
    from transformers.utils import logging

    torch.manual_seed(0)
    before = (torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled())
    session = begun(Case("torch", tiny_folder), lora=LoraSpec(4, 8.0, 0.1))
    session.step([BATCH], 1e-2)
    session.generate([[1, 2]], 3, (), temperature=1.0)
    after = (torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
