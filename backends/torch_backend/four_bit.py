"""Frozen weights, dequantised or multiplied; 4-bit ones by bitsandbytes' kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
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
Kernel = Callable[..., None]  # code, packed, scales, out, numbers in a block, numbers in all, stream


class BlockScales:
    """The scales of a block's 4-bit weights, unpacked by one kernel for all of them.

    A kernel costs a GPU's host as much as a product does, whatever its size. Those of one block at a time are kept.
    """

    _kept: tuple[BlockScales, torch.Tensor] | None = None  # of the block that was asked last, of whichever model

    def __init__(self, states: Sequence[Any]) -> None:
        """Their packed scales become parts of one tensor."""
        counts = [state.absmax.numel() for state in states]
        self._starts = dict(zip(map(id, states), accumulate(counts, initial=0), strict=False))
        self._code = states[0].state2.code
        self._packed = torch.cat([state.absmax.flatten() for state in states])
        self._scales = torch.cat([state.state2.absmax.flatten() for state in states])
        offsets = [
            state.offset.reshape(1).expand(count // _SCALES) for state, count in zip(states, counts, strict=True)
        ]
        self._offsets = torch.cat(offsets)[:, None]
        for state, packed in zip(states, self._packed.split(counts), strict=True):
            state.absmax = packed
            state.block = self

    def of(self, state: Any, kernel: Kernel, stream: int) -> torch.Tensor:
        """Those of one weight, float32."""
        if BlockScales._kept is None or BlockScales._kept[0] is not self:
            BlockScales._kept = None
            numbers = _unpacked_scales(kernel, self._code, self._packed, self._scales, stream)
            numbers.view(-1, _SCALES).add_(self._offsets)
            BlockScales._kept = self, numbers
        start = self._starts[id(state)]
        return BlockScales._kept[1][start : start + state.absmax.numel()]


def join_scales(block: torch.nn.Module) -> None:
    """From here on the scales of this block's 4-bit weights on a CUDA card are unpacked together, where they can be."""
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in block.modules()]
    joined = list({id(state): state for state in states if state is not None and can_join(state)}.values())
    if len(joined) > 1 and all(torch.equal(state.state2.code, joined[0].state2.code) for state in joined):
        BlockScales(joined)


def can_join(state: Any) -> bool:
    """Whether no scale of scales is shared by two weights."""
    usual = bool(state.nested) and state.state2.blocksize == _SCALES
    return usual and state.absmax.is_cuda and state.absmax.numel() % _SCALES == 0


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
        stream = torch.cuda.current_stream(device).cuda_stream
        absmax = scales_of(state, scales, stream)
        out = torch.empty(state.shape, dtype=dtype, device=device)
        pointers = None, packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        weights(*pointers, state.blocksize, out.numel(), stream)
        return out

    numbers = torch.linspace(-1, 1, 256 * 1024, device=device, dtype=dtype).reshape(256, 1024)
    layers = [
        quantize_4bit(part, blocksize=64, compress_statistics=True, quant_type=kind) for part in (numbers, -numbers)
    ]
    expected = [_by_bitsandbytes(*layer) for layer in layers]
    alone = all(torch.equal(unpack(*layer), weight) for layer, weight in zip(layers, expected, strict=True))
    BlockScales([state for _, state in layers])
    together = all(torch.equal(unpack(*layer), weight) for layer, weight in zip(layers, expected, strict=True))
    return unpack if alone and together else None


def scales_of(state: Any, kernel: Kernel, stream: int) -> torch.Tensor:
    """A 4-bit weight's scales, float32."""
    block: BlockScales | None = getattr(state, "block", None)
    if block is not None:
        return block.of(state, kernel, stream)
    return _unpacked_scales(kernel, state.state2.code, state.absmax, state.state2.absmax, stream).add_(state.offset)


def _unpacked_scales(
    kernel: Kernel, code: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, stream: int
) -> torch.Tensor:
    out = torch.empty(packed.shape, dtype=torch.float32, device=packed.device)
    pointers = code.data_ptr(), packed.data_ptr(), scales.data_ptr(), out.data_ptr()
    kernel(*pointers, _SCALES, out.numel(), stream)
    return out


def _kernel(name: str) -> Kernel | None:
    try:
        from bitsandbytes.cextension import lib

        kernel = lib._lib[name]  # an object of its own, so that setting its types changes no other caller's
    except (ImportError, AttributeError, TypeError):
        return None
    kernel.argtypes, kernel.restype = [_POINTER] * 4 + [_INT, _INT, _POINTER], None
    called: Kernel = kernel
    return called
