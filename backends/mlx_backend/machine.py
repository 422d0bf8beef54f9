"""This machine as MLX sees it. Imports MLX, but not mlx-lm."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mlx.core as mx

from backends.interface import Wanted
from backends.mlx_backend.device import device_name, free_of, half_type, pick_device, unused_card


def probe() -> str | None:
    try:
        mx.eval(mx.ones(2) + 1)
    except RuntimeError as error:
        return f"MLX does not compute on {mx.default_device()} here: {error}"
    return None


def unused_accelerator() -> str | None:
    return None if pick_device("auto").type != mx.cpu else unused_card()


def describe(device: Wanted = "auto") -> dict[str, Any]:
    return {
        "device": device_name(pick_device(device)),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "4bit": True,
        "checkpointing": True,
        "half": half_type(pick_device(device)),
        "others": "",
    }


def free_bytes(device: Wanted = "auto") -> int | None:
    return free_of(pick_device(device))
