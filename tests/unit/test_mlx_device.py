"""What MLX is asked on a GPU: bounds of its memory, what is free, and every way in which memory runs out."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from backends import registry
from backends.interface import OutOfMemory

if registry.probe("mlx") is not None:
    pytest.skip("mlx is not usable here", allow_module_level=True)

import mlx.core as mx

from backends.mlx_backend import device as devices
from tests.conformance.toy import Case, begun, identical, toy_batch

GPU: Any = type("Gpu", (), {"type": mx.gpu})()  # a device that this machine need not have
GIB = 2**30


def apple(monkeypatch: pytest.MonkeyPatch, working_set: int | None, active: int = 0, cache: int = 0) -> dict[str, int]:
    """A GPU with such memory; what is set on it."""
    told: dict[str, int] = {}
    facts = {"device_name": "Apple M2"} | ({"max_recommended_working_set_size": working_set} if working_set else {})
    monkeypatch.setattr(mx, "device_info", lambda device: facts)
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: cache)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: active)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: told.update(wired=size))
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: told.update(cache=size))
    return told


@pytest.mark.parametrize(("gib", "cache"), [(5, 5 * GIB // 8), (11, 11 * GIB // 8), (48, 2 * GIB)])
def test_kept_buffers_are_bounded_and_not_all_is_wired(monkeypatch: pytest.MonkeyPatch, gib: int, cache: int) -> None:
    told = apple(monkeypatch, gib * GIB)
    devices.bound_memory(GPU)
    assert told == {"wired": int(0.9 * gib * GIB), "cache": cache}


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = apple(monkeypatch, None)
    devices.bound_memory(GPU)
    devices.bound_memory(mx.Device(mx.cpu))
    assert told == {} and devices.free_of(GPU) is None


def test_free_memory_of_an_nvidia_card_is_the_drivers_and_kept_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    apple(monkeypatch, None, active=3 * GIB, cache=GIB)
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "RTX 4090", "free_memory": 2 * GIB})
    assert devices.free_of(GPU) == 3 * GIB


def test_kept_buffers_count_as_free_and_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    apple(monkeypatch, 5 * GIB, active=3 * GIB, cache=GIB)
    monkeypatch.setattr(devices, "available_bytes", lambda: 8 * GIB)
    assert devices.free_of(GPU) == 2 * GIB
    assert devices.held_bytes(GPU) == 4 * GIB


def test_what_other_programs_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is shared: the system swaps long before Metal refuses."""
    apple(monkeypatch, 5 * GIB, active=GIB, cache=GIB // 2)
    monkeypatch.setattr(devices, "available_bytes", lambda: GIB // 2)
    assert devices.free_of(GPU) == GIB


@pytest.mark.parametrize(
    "said",
    [
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOut)",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallback)",
        "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallback)",
        "[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery)",
        "[malloc_or_wait] Unable to allocate 17179869184 bytes.",
        "[metal::malloc] Attempting to allocate 9663676416 bytes which is greater than the maximum allowed",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
    ],
)
def test_every_lack_of_memory_splits_the_step_and_changes_nothing(
    tiny_folder: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("mlx", tiny_folder))
    before, loss = session.get_state(), session._forward.loss
    held: list[Any] = []
    clear = mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: (held.append(held[0]() if held else None), clear()))

    class Array:
        """Stands for what a step's frames hold."""

    def fail(*arguments: Any) -> Any:
        array = Array()
        held[:] = [weakref.ref(array)]
        raise RuntimeError(said)

    session._forward.loss = fail
    with pytest.raises(OutOfMemory) as error:
        session.step([toy_batch()], 1e-2)
    assert said[:20] in str(error.value)
    assert held[1:] == [None]  # freed before the kept buffers are given back
    identical(before, session.get_state())
    session._forward.loss = loss
    session.step([toy_batch()], 1e-2)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(ValueError, match="shapes"), devices.memory_guard():
        raise ValueError("[matmul] shapes do not fit")


def test_kept_buffers_are_given_back_between_evaluation_and_training(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = begun(Case("mlx", tiny_folder))
    calls: list[str] = []
    clear = mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: (calls.append("cleared"), clear()))
    for work in ("score", "score", "step", "step", "score"):
        calls.append(work)
        session.score(toy_batch()) if work == "score" else session.step([toy_batch()], 1e-2)
    assert calls == ["score", "score", "step", "cleared", "step", "score", "cleared"]


def test_float32_is_not_multiplied_in_tf32() -> None:
    assert os.environ["MLX_ENABLE_TF32"] == "0"
