"""The MLX device: choice, name, memory and its limits, and every out-of-memory error."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version

import mlx.core as mx

from backends.interface import Device, Half, OutOfMemory, Wanted
from backends.memory import available_bytes, process_peak_bytes
from backends.nvidia import unused_by

# float32 means float32: on newer GPUs MLX would multiply it in TF32, with 10 bits of mantissa. MLX reads this at its
# first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# As MLX's allocators and Metal say it. A command buffer that fails because it took too long, or kept the screen from
# being drawn, has the same remedy as one without memory: less work at once.
_NO_MEMORY = ("malloc", "insufficient memory", "out of memory", "unable to allocate", "command buffer execution failed")
_WIRED = 0.9  # of what Metal recommends; all of it made machines crash (mlx-lm issue 828)
_CACHE, _CACHE_SHARE = 2 * 2**30, 8  # bytes of freed buffers that MLX may keep, at most one part in so many


def pick_device(wanted: Wanted) -> mx.Device:
    """The GPU where this build of MLX has one, or the CPU where that is asked for."""
    return mx.Device(mx.cpu) if wanted == "cpu" else mx.default_device()


def unused_card() -> str | None:
    """Why MLX, which found no card, does not use the one that is there; None: there is none."""
    return unused_by(f"mlx {version('mlx')}", None, lambda driver: 'pip install "recipe-finetune[mlx-cuda]"')


def device_kind(device: mx.Device) -> Device:
    return "cpu" if device.type == mx.cpu else "gpu"


def half_type(device: mx.Device) -> Half:
    """bfloat16, but on the GPUs of M1 and M2, which have none of their own (1.2 to 1.7 times as slow)."""
    architecture = "" if device.type == mx.cpu else str(mx.device_info(device).get("architecture", ""))
    return "float16" if architecture.startswith(("applegpu_g13", "applegpu_g14")) else "bfloat16"


def device_name(device: mx.Device) -> str:
    if device.type == mx.cpu:
        return "cpu"
    return f"gpu: {mx.device_info(device).get('device_name', 'unknown')}"


def bound_memory(device: mx.Device) -> None:
    """On Apple's GPUs: the weights stay resident, and what MLX keeps of freed buffers is bounded.

    Without a bound it keeps them until the working set is full, since new widths seldom fit old buffers.
    """
    if (working_set := _working_set_bytes(device)) is not None:
        mx.set_wired_limit(int(_WIRED * working_set))
        mx.set_cache_limit(min(_CACHE, working_set // _CACHE_SHARE))


def held_bytes(device: mx.Device) -> int:
    """The most memory held so far; of a GPU with the freed buffers that MLX keeps now."""
    if device.type == mx.cpu:
        return process_peak_bytes()
    return max(int(mx.get_peak_memory()), int(mx.get_active_memory()) + int(mx.get_cache_memory()))


def free_of(device: mx.Device) -> int | None:
    """What can still be allocated without swapping: freed buffers count, and so do other programs."""
    if device.type == mx.cpu:
        return available_bytes()
    if (working_set := _working_set_bytes(device)) is None:
        free = mx.device_info(device).get("free_memory")  # of an NVIDIA card
        return None if free is None else int(free) + int(mx.get_cache_memory())
    unified = available_bytes() + int(mx.get_cache_memory())
    return max(0, min(working_set - int(mx.get_active_memory()), unified))


@contextmanager
def memory_guard() -> Iterator[None]:
    """Every way in which MLX says that memory ran out, as OutOfMemory."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        reason = str(error)
        if not isinstance(error, MemoryError) and not any(sign in reason.lower() for sign in _NO_MEMORY):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the arrays that are to be freed
    else:
        return
    with suppress(RuntimeError):  # what other command buffers still have to say of the same failure
        mx.synchronize()
    mx.clear_cache()
    raise OutOfMemory(reason or "out of memory")


def _working_set_bytes(device: mx.Device) -> int | None:
    """What Apple's GPUs say that they can hold; None for other devices."""
    size = None if device.type == mx.cpu else mx.device_info(device).get("max_recommended_working_set_size")
    return None if size is None else int(size)
