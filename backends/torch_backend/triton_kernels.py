"""Our CUDA kernels, of which `fused` asks whether they work here."""

from __future__ import annotations

from backends.torch_backend.triton_elementwise import gated, gated_back, rms_norm, rms_norm_back, rotate
from backends.torch_backend.triton_head import cross_entropy
from backends.torch_backend.triton_products import add_up, down, gradient, unpack

__all__ = [
    "add_up",
    "cross_entropy",
    "down",
    "gated",
    "gated_back",
    "gradient",
    "rms_norm",
    "rms_norm_back",
    "rotate",
    "unpack",
]
