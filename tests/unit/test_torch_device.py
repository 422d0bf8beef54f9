"""What torch is asked on a GPU: repeatable kernels, free memory, and every way in which memory runs out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import BackendError, OutOfMemory

if registry.probe("torch") is not None:
    pytest.skip("torch is not usable here", allow_module_level=True)

import torch

from backends.nvidia import Driver
from backends.torch_backend import cards, machine
from backends.torch_backend import device as devices
from backends.torch_backend import session as sessions
from finetune.training.job import refuse_unused_accelerator
from tests.conformance.toy import Case, begun, identical, toy_batch
from tests.unit.toy_run import recipe

BATCH = toy_batch()
CUDA, MPS, CPU = torch.device("cuda", 0), torch.device("mps"), torch.device("cpu")
NO_KERNEL = RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set ...")


@pytest.mark.parametrize("strict", [True, False])
def test_on_cuda_kernels_are_repeatable_and_new_tensors_are_not_filled(strict: bool) -> None:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with devices.repeatable_kernels(CUDA, strict):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() != strict
        assert not torch.utils.deterministic.fill_uninitialized_memory
        warnings.warn("Flash Attention defaults to a non-deterministic algorithm.", stacklevel=1)  # not shown
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


@pytest.mark.parametrize(
    ("system", "release", "bounded"),
    [
        ("win32", "10", True),
        ("linux", "5.15.1-microsoft-standard-WSL2", True),
        ("linux", "6.8.0-45-generic", False),
    ],
)
def test_where_the_driver_would_spill_torch_raises(
    system: str, release: str, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_300_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 400_000_000)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300_000_000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    devices.bound_memory(CUDA)
    devices.bound_memory(CPU)
    assert told == ([0.8] if bounded else [])
    assert devices.free_of(CUDA) == 6_400_000_000 - (300_000_000 if bounded else 0)  # no more than torch may take


def test_on_a_cpu_nothing_is_changed() -> None:
    with devices.repeatable_kernels(CPU, True):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_repeatable_kernel_runs_all_the_same_and_the_session_says_so(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("torch", tiny_folder))
    asked: list[bool] = []
    kernels, states = sessions.repeatable_kernels, session._forward.uploaded_states

    def watched(device: Any, strict: bool) -> Any:
        asked.append(strict)
        return kernels(device, strict)

    def refused(*arguments: Any) -> Any:
        if asked[-1]:
            raise NO_KERNEL
        return states(*arguments)

    monkeypatch.setattr(sessions, "repeatable_kernels", watched)
    monkeypatch.setattr(session._forward, "uploaded_states", refused)
    assert session.repeatable
    results = [session.step([BATCH], 1e-2) for _ in range(2)]
    assert not session.repeatable and asked == [True, False, False]
    expected = begun(Case("torch", tiny_folder))
    assert results == [expected.step([BATCH], 1e-2) for _ in range(2)]
    identical(session.get_state(), expected.get_state())


def test_free_memory_on_cuda_is_the_drivers_and_what_torch_holds_without_using_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("asked"), (1_000, 8_000))[1])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert devices.free_of(CUDA) == 1_200
    assert calls == ["emptied", "asked"]


def test_free_memory_on_mps_is_what_metal_recommends_less_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5_000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2_000)
    for available, free in ((9_000, 3_000), (1_000, 1_000)):  # other programs share the memory
        monkeypatch.setattr(devices, "available_bytes", lambda available=available: available)
        assert devices.free_of(MPS) == free


def test_the_peak_on_mps_is_the_most_that_torch_held_at_any_time(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("torch", tiny_folder))
    session._device = MPS
    peaks = []
    for held in (3_000, 5_000, 4_000):
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda held=held: held)
        peaks.append(session.peak_bytes())
    assert peaks == [3_000, 5_000, 5_000]


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((6, 1), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((7, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", True),
        ((6, 1), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", True),
        ((8, 6), "sm_80", True),  # machine code runs on later cards of its major version
        ((8, 0), "sm_86", False),
        ((12, 0), "sm_80 sm_90", False),
        ((12, 0), "sm_80 sm_90 compute_90", True),  # PTX is compiled for every later card
        ((8, 9), "sm_90 compute_90", False),
        ((9, 0), "sm_80 sm_90a", True),
        ((12, 1), "sm_75 sm_120f", True),
        ((8, 6), "", True),
    ],
)
def test_code_runs_on_cards_as_cuda_says(capability: tuple[int, int], compiled: str, runs: bool) -> None:
    assert cards.has_code(capability, compiled.split()) == runs


@pytest.mark.parametrize(("capability", "used"), [((6, 1), False), ((7, 0), False), ((7, 5), True)])
def test_a_card_without_code_is_not_used_and_the_build_that_has_it_is_named(
    capability: tuple[int, int], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (
        ("is_available", True), ("current_device", 0), ("device_count", 1), ("get_device_name", "GTX 1080"),
        ("get_device_capability", capability), ("get_arch_list", ["sm_75", "sm_80", "sm_90", "sm_120"]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cards, "driver", lambda: Driver(1, (13, 0), capability=capability))
    assert devices.pick_device("auto").type == ("cuda" if used else "cpu")
    assert devices.pick_device("cpu").type == "cpu"
    said = machine.unused_accelerator()
    if used:
        assert said is None
        return
    assert said is not None and "GTX 1080" in said and f"{capability[0]}.{capability[1]}" in said
    assert said.endswith("whl/cu126")
    monkeypatch.setattr(registry, "usable", lambda name: machine)
    monkeypatch.setattr(registry, "choose", lambda requested: "torch")
    with pytest.raises(BackendError, match="device=cpu"):
        refuse_unused_accelerator(recipe(backend="torch"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 5.00 GB)",
        "Invalid buffer size: 12.00 GiB",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_runs_out_is_recognised_as_each_library_says_it(message: str) -> None:
    with pytest.raises(OutOfMemory, match="cpu: "), devices.memory_guard(CPU):
        raise RuntimeError(message)


def test_gradients_are_dropped_before_memory_goes_back_to_the_device(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("torch", tiny_folder))
    left: list[bool] = []

    def guard_ends(error: Exception) -> bool:
        left.extend(tensor.grad is not None for tensor in session._adapter.values())
        return True

    monkeypatch.setattr(devices, "says_no_memory", guard_ends)
    monkeypatch.setattr(session._optimiser, "update", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(OutOfMemory):
        session.step([BATCH], 1e-2)
    assert left and not any(left)


@pytest.mark.parametrize(
    ("system", "release", "given", "expected"),
    [
        ("linux", "6.8.0-generic", {}, ["expandable_segments:True"] * 2),
        ("linux", "6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, [None, "max_split_size_mb:64"]),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", {}, [None, None]),
        ("win32", "11", {}, [None, None]),
    ],
)
def test_blocks_of_a_cards_memory_grow_where_linux_lets_them(
    system: str, release: str, given: dict[str, str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.os, "environ", dict(given))
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    devices._let_blocks_grow()
    found = devices.os.environ
    assert [found.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")] == expected


def test_torchs_fused_norm_computes_what_the_norm_written_here_does() -> None:
    """On CUDA the fused one runs; here both run on the CPU."""
    from backends.torch_backend.norms import Gain, _RmsNorm

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=draw, requires_grad=True)
    weight, grad_output = torch.rand(64, generator=draw) + 0.5, torch.randn(3, 5, 64, generator=draw)
    ours, _ = _RmsNorm.apply(x, weight, 1e-6, Gain(rounded_first=True))
    fused = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
    grads = [torch.autograd.grad(y, x, grad_output)[0].numpy() for y in (ours, fused)]
    np.testing.assert_allclose(fused.detach().numpy(), ours.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[1], grads[0], rtol=1e-4, atol=1e-6)
