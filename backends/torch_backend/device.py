"""The torch device: choice, name, memory, random numbers, deterministic kernels."""

from __future__ import annotations

import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from backends.interface import Device, Half, OutOfMemory
from backends.memory import available_bytes, process_peak_bytes
from backends.torch_backend.cards import card_without_code

# oneDNN keeps a kernel for each shape of product, 1,024 by default, and memory between them that is not given back.
# With fewer than a step has shapes, each layer would compile its kernels anew; attention in tiles has the most shapes.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

# As torch's allocators, cuBLAS, cuDNN and Metal say it.
_NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "Invalid buffer size",
)  # fmt: skip


_FOR_THE_DRIVER = 300 * 10**6  # what they take as they go


def pick_device(requested: str) -> torch.device:
    """The first of cuda, mps and cpu that torch can use here, or the CPU where that is asked for."""
    if requested != "cpu" and torch.cuda.is_available() and not card_without_code():
        # cuBLAS reads this once, when it starts; without it equal runs may differ in their last bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _let_blocks_grow()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans its attention anew for each shape, up to a second each
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if requested != "cpu" and torch.backends.mps.is_available() else "cpu")


def _let_blocks_grow() -> None:
    """Blocks of a card's memory grow where a larger tensor comes, in the place of a new block for each size: answers
    and micro-batches have ever new ones. The allocator reads this once; torch 2.9 renamed it. Linux alone has it.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and not _spills() and not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "expandable_segments:True"))


def bound_memory(device: torch.device) -> None:
    """Where the driver spills: torch raises where the card is full."""
    if device.type == "cuda" and (spared := _for_the_driver()):
        free, total = torch.cuda.mem_get_info(device)
        usable = free + torch.cuda.memory_reserved(device) - spared
        torch.cuda.set_per_process_memory_fraction(max(0.0, usable / total), device)


def _for_the_driver() -> int:
    """Bytes of a card that are left to the driver and the screen on Windows and WSL2; elsewhere none.

    NVIDIA's driver there moves what does not fit into the machine's memory (its "CUDA Sysmem Fallback Policy"), and
    steps take 5 to 20 times as long, without a word.
    """
    return _FOR_THE_DRIVER if _spills() else 0


def _spills() -> bool:
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def half_type(device: torch.device) -> Half:
    """bfloat16, but on NVIDIA's cards before compute capability 8.0, which only emulate it (3 to 8 times as slow)."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return "float16" if old else "bfloat16"


def device_kind(device: torch.device) -> Device:
    return "cpu" if device.type == "cpu" else "gpu"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return "mps: Apple GPU" if device.type == "mps" else "cpu"


def held_bytes(device: torch.device) -> int:
    """The most memory held so far; of an Apple GPU what is held now, with the freed buffers that torch keeps."""
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else process_peak_bytes()


def free_of(device: torch.device) -> int:
    """What can still be allocated. What torch holds without using it goes back to the device first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # parts of blocks in use
        return max(0, int(torch.cuda.mem_get_info(device)[0]) + int(unused) - _for_the_driver())
    if device.type == "mps":
        torch.mps.empty_cache()
        left = int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
        return max(0, min(left, available_bytes()))  # memory is shared with all programs
    return available_bytes()


def uploaded(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device; all in one copy that the host does not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    packed = packed_bytes(arrays)
    pinned = torch.empty(packed.size, dtype=torch.uint8, pin_memory=True)  # a copy from other memory waits
    pinned.numpy()[:] = packed
    return unpacked(pinned.to(device, non_blocking=True), arrays)


def packed_bytes(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """All numbers, one array after the other, each from a multiple of 16 bytes on."""
    parts = [np.frombuffer(array.tobytes() + bytes(-array.nbytes % 16), np.uint8) for array in arrays]
    return np.concatenate(parts)


def unpacked(packed: torch.Tensor, like: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    """From the bytes of `packed_bytes(like)` the tensors, which are views of them."""
    tensors, start = [], 0
    for array in like:
        part = packed[start : start + array.nbytes]
        tensors.append(part.view(getattr(torch, array.dtype.name)).view(array.shape))
        start += array.nbytes + -array.nbytes % 16
    return tensors


@contextmanager
def random_numbers(device: torch.device, *seed: int) -> Iterator[None]:
    """Random numbers that are a function of `seed` alone; the process's own generator is left as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield


@contextmanager
def repeatable_kernels(device: torch.device, strict: bool) -> Iterator[None]:
    """On CUDA: kernels that give the same bits every time.

    strict: an operation that has no such kernel raises RuntimeError (`lacks_repeatable_kernel`), and attention's
    gradient is repeatable too. Otherwise such an operation uses the kernel that it has, without a warning.
    """
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write NaN into each new tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(?s).*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def lacks_repeatable_kernel(error: RuntimeError) -> bool:
    return "does not have a deterministic implementation" in str(error)


def says_no_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


@contextmanager
def memory_guard(device: torch.device) -> Iterator[None]:
    """Every way in which torch says that memory ran out, as OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not says_no_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that are to be freed
        reason = str(error).partition("\n")[0] or "out of memory"
    else:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    raise OutOfMemory(f"{device_name(device)}: {reason}")
