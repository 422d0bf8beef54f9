"""A frozen layer's weight as numbers, and its product; of 4-bit weights by bitsandbytes' kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear as product_with

# With so few rows bitsandbytes may multiply by packed weights, which is faster then (its own bound, of 0.50).
_FEW = 1536
_SCALES = 256  # that share a scale of their own
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


def base_product(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """W x + b. [N, in] -> [N, out]"""
    state = getattr(layer.weight, "quant_state", None)
    if not x.is_cuda or len(x) <= _FEW or state is None or state.dtype != x.dtype:
        out: torch.Tensor = layer(x)
        return out
    bias = layer.bias
    return product_with(x, dense(layer, x.dtype), None if bias is None else bias.to(x.dtype))


def dense(layer: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight [out, in] as numbers; a 4-bit one in this type."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    packed = layer.weight.data
    usual = packed.is_cuda and state.dtype == dtype and state.nested and state.state2.blocksize == _SCALES
    unpack = _unpacker(packed.device, state.quant_type, dtype) if usual else None
    return _by_bitsandbytes(packed, state).to(dtype) if unpack is None else unpack(packed, state)


def _by_bitsandbytes(packed: torch.Tensor, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(packed, state)
    return weight


Unpack = Callable[[torch.Tensor, Any], torch.Tensor]


@cache
def _unpacker(device: torch.device, kind: str, dtype: torch.dtype) -> Unpack | None:
    """bitsandbytes' two kernels, called directly; None where they are not there, or do not give what it gives itself.

    The checks and dispatches around them cost a GPU's host ten times as much as the calls.
    """
    from bitsandbytes.functional import quantize_4bit

    number = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype)
    scales, weights = _kernel("cdequantize_blockwise_fp32"), _kernel(f"cdequantize_blockwise_{number}_{kind}")
    if scales is None or weights is None:
        return None

    def unpack(packed: torch.Tensor, state: Any) -> torch.Tensor:
        stream, of_scales = torch.cuda.current_stream(device).cuda_stream, state.state2
        absmax = torch.empty(state.absmax.shape, dtype=torch.float32, device=device)
        pointers = of_scales.code.data_ptr(), state.absmax.data_ptr(), of_scales.absmax.data_ptr(), absmax.data_ptr()
        scales(*pointers, _SCALES, absmax.numel(), stream)
        absmax += state.offset
        out = torch.empty(state.shape, dtype=dtype, device=device)
        pointers = None, packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        weights(*pointers, state.blocksize, out.numel(), stream)
        return out

    numbers = torch.linspace(-1, 1, 64 * 1024, device=device, dtype=dtype).reshape(64, 1024)
    packed, state = quantize_4bit(numbers, blocksize=64, compress_statistics=True, quant_type=kind)
    return unpack if torch.equal(unpack(packed, state), _by_bitsandbytes(packed, state)) else None


def _kernel(name: str) -> Callable[..., None] | None:
    """code, packed, scales, out, numbers in a block, numbers in all, stream."""
    try:
        from bitsandbytes.cextension import lib

        kernel = lib._lib[name]  # an object of its own, so that setting its types changes no other caller's
    except (ImportError, AttributeError, TypeError):
        return None
    kernel.argtypes, kernel.restype = [_POINTER] * 4 + [_INT, _INT, _POINTER], None
    called: Callable[..., None] = kernel
    return called
