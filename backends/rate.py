"""How fast this machine multiplies matrices under a backend: what the time of a run is foretold from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_SIZE = (512, 2048, 2048)  # tokens, inputs, outputs: of the order of one layer's product
_SECONDS = 0.15


def measured_rate(backend: str, bfloat16: bool) -> float:
    """Floating-point operations a second on the backend's own device. The backend must be usable here."""
    product = _product(backend, bfloat16)
    product()  # the first call starts threads and chooses kernels
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        product()
        done += 1
    return done * 2.0 * float(np.prod(_SIZE)) / (time.perf_counter() - begun)


def _product(backend: str, bfloat16: bool) -> Callable[[], Any]:
    rows, inputs, outputs = _SIZE
    if backend == "torch":
        import torch

        from backends.torch_backend.device import pick_device

        kind: dict[str, Any] = {"dtype": torch.bfloat16 if bfloat16 else torch.float32, "device": pick_device("auto")}
        x, w = torch.ones(rows, inputs, **kind), torch.ones(outputs, inputs, **kind)
        return lambda: (x @ w.T).flatten()[0].item()  # waits for the device
    if backend == "mlx":
        import mlx.core as mx

        if bfloat16 or sys.platform == "darwin" or mx.default_device() != mx.Device(mx.cpu):
            dtype = mx.bfloat16 if bfloat16 else mx.float32
            a, b = mx.ones((rows, inputs), dtype), mx.ones((inputs, outputs), dtype)
            return lambda: mx.eval(a @ b)
    left, right = np.ones((rows, inputs), np.float32), np.ones((inputs, outputs), np.float32)
    return lambda: left @ right
