"""Frozen weights, dequantised or multiplied; 4-bit ones by bitsandbytes' kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear as product_with

from backends.torch_backend.fused import kernels_on

# With so few rows bitsandbytes may multiply by packed weights, which is faster then (its own bound, of 0.50).
_FEW = 1536
_SCALES = 256  # that share a scale of their own
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


def base_products(layers: Sequence[torch.nn.Linear], x: torch.Tensor) -> list[torch.Tensor]:
    """W x + b of each layer. [N, in] -> [N, out]"""
    states = [getattr(layer.weight, "quant_state", None) for layer in layers]
    if not x.is_cuda or len(x) <= _FEW or any(state is None or state.dtype != x.dtype for state in states):
        return [layer(x) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.to(x.dtype) for layer in layers]
    return [product_with(x, *pair) for pair in zip(dense_weights(layers, x.dtype), biases, strict=True)]


def dense_weights(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> list[torch.Tensor]:
    """The frozen weights [out, in] of layers of one input as numbers; 4-bit ones in this type."""
    together: Together | None = getattr(getattr(layers[0].weight, "quant_state", None), "together", None)
    if together is not None and together.is_of(layers):
        kernels = kernels_on(layers[0].weight.device, dtype)
        if kernels is not None:
            return together.weights(dtype, kernels)
    return [dense(layer, dtype) for layer in layers]


def dense(layer: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight [out, in] as numbers; a 4-bit one in this type."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    packed = layer.weight.data
    usual = packed.is_cuda and state.dtype == dtype and _has_scales_of_scales(state)
    unpack = _unpacker(packed.device, state.quant_type, dtype) if usual else None
    return _by_bitsandbytes(packed, state).to(dtype) if unpack is None else unpack(packed, state)


def _by_bitsandbytes(packed: torch.Tensor, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(packed, state)
    return weight


Unpack = Callable[[torch.Tensor, Any], torch.Tensor]
Kernel = Callable[..., None]  # code, packed, scales, out, numbers in a block, numbers in all, stream


class Together:
    """4-bit weights of layers of one input, one below the other, unpacked by one kernel.

    The layers' own weights become parts of it, so that bitsandbytes reads them as before.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        states = [layer.weight.quant_state for layer in layers]
        self._code, self._levels, self._sharing = states[0].state2.code, states[0].code, states[0].blocksize
        self._shapes = [tuple(state.shape) for state in states]
        self._packed = torch.cat([layer.weight.data.flatten() for layer in layers])
        self._scales = torch.cat([state.absmax.flatten() for state in states])
        counts = [state.absmax.numel() // _SCALES for state in states]
        offsets = [state.offset.reshape(1).expand(count) for state, count in zip(states, counts, strict=True)]
        self._groups = torch.cat([state.state2.absmax.flatten() for state in states]), torch.cat(offsets)
        packed = self._packed.split([layer.weight.data.numel() for layer in layers])
        scales = self._scales.split([state.absmax.numel() for state in states])
        for layer, state, part, own in zip(layers, states, packed, scales, strict=True):
            layer.weight.data, state.absmax, state.together = part.view(layer.weight.data.shape), own, self

    def weights(self, dtype: torch.dtype, kernels: Any) -> list[torch.Tensor]:
        """[out, in] of each layer, parts of one tensor."""
        heights, width = [out for out, _ in self._shapes], self._shapes[0][1]
        whole = torch.empty(sum(heights), width, dtype=dtype, device=self._packed.device)
        kernels.unpack(whole, self._packed, self._scales, self._code, self._groups, self._levels, self._sharing)
        return list(whole.split(heights))

    def is_of(self, layers: Sequence[Any]) -> bool:
        return [tuple(layer.weight.quant_state.shape) for layer in layers] == self._shapes


def unpack_together(layers: Sequence[Any]) -> bool:
    """From here on these layers' weights are unpacked by one kernel of our own, where it can be. Returns whether."""
    states: list[Any] = [getattr(layer.weight, "quant_state", None) for layer in layers]
    if None in states or not all(map(_usual, states)) or not all(_alike(states[0], state) for state in states):
        return False
    kernels = kernels_on(layers[0].weight.device, states[0].dtype)
    if kernels is None:
        return False
    expected = [_by_bitsandbytes(layer.weight.data, state) for layer, state in zip(layers, states, strict=True)]
    together = Together(layers)
    if all(torch.equal(*pair) for pair in zip(together.weights(states[0].dtype, kernels), expected, strict=True)):
        return True
    for state in states:
        del state.together
    return False


def _usual(state: Any) -> bool:
    """Whether scales have scales of their own, and none of those is shared by two weights."""
    return _has_scales_of_scales(state) and state.absmax.numel() % _SCALES == 0


def _has_scales_of_scales(state: Any) -> bool:
    return bool(state.nested) and state.state2.blocksize == _SCALES


def _alike(first: Any, second: Any) -> bool:
    """Whether both weights have the same input and their numbers mean the same."""
    codes = torch.equal(first.code, second.code) and torch.equal(first.state2.code, second.state2.code)
    return codes and (first.shape[1], first.blocksize, first.dtype) == (second.shape[1], second.blocksize, second.dtype)


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
        absmax = torch.empty(state.absmax.shape, dtype=torch.float32, device=device)
        nested = state.state2.code.data_ptr(), state.absmax.data_ptr(), state.state2.absmax.data_ptr()
        scales(*nested, absmax.data_ptr(), _SCALES, absmax.numel(), stream)
        absmax.add_(state.offset)
        out = torch.empty(state.shape, dtype=dtype, device=device)
        pointers = None, packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        weights(*pointers, state.blocksize, out.numel(), stream)
        return out

    numbers = torch.linspace(-1, 1, 256 * 1024, device=device, dtype=dtype).reshape(256, 1024)
    layer = quantize_4bit(numbers, blocksize=64, compress_statistics=True, quant_type=kind)
    return unpack if torch.equal(unpack(*layer), _by_bitsandbytes(*layer)) else None


def _kernel(name: str) -> Kernel | None:
    try:
        from bitsandbytes.cextension import lib

        kernel = lib._lib[name]  # an object of its own, so that setting its types changes no other caller's
    except (ImportError, AttributeError, TypeError):
        return None
    kernel.argtypes, kernel.restype = [_POINTER] * 4 + [_INT, _INT, _POINTER], None
    called: Kernel = kernel
    return called
