"""A CUDA kernel in Triton: the losses of logits, whose gradient is written over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backends.torch_backend.triton_launch import launch

_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _capped(raw, scale, cap, CAPPED: tl.constexpr):
    """The logit that a model makes of what its last layer gives."""
    z = raw.to(tl.float32) * scale
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return z


@triton.jit
def _cross_entropy(
    logits, targets, shares, losses, V, scale, cap, BLOCK: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * V
    target, share = tl.load(targets + row), tl.load(shares + row)
    top, total = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):  # each lane its own largest one and sum, so that nothing is summed up on the way
        at = first + tl.arange(0, BLOCK)
        z = _capped(tl.load(start + at, mask=at < V, other=0.0), scale, cap, CAPPED)
        z = tl.where(at < V, z, _LOWEST)
        above = tl.maximum(top, z)
        total = total * tl.exp(top - above) + tl.where(at < V, tl.exp(z - above), 0.0)
        top = above
    highest = tl.max(top, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(losses + row, share * (normaliser - _capped(tl.load(start + target), scale, cap, CAPPED)))
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = _capped(tl.load(start + at, mask=at < V, other=0.0), scale, cap, CAPPED)
        grad = tl.exp(z - normaliser) * share
        grad = tl.where(at == target, grad - share, grad) * scale
        if CAPPED:
            grad *= 1.0 - (z / cap) * (z / cap)
        tl.store(start + at, grad, mask=at < V)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    """share * nll of each row [N], of softmax(cap * tanh(scale * logits / cap)); without a cap, of scale * logits.

    logits [N, V] from end to end: their gradient is written over them. targets [N] int64, shares [N] float32.
    """
    losses, width = torch.empty_like(shares), logits.shape[1]
    constants = {"BLOCK": 4096, "CAPPED": cap is not None}
    tensors, numbers = (logits, targets, shares, losses), (width, scale, cap or 1.0)
    launch(_cross_entropy, (len(logits),), tensors, numbers, constants, (width,), num_warps=8)
    return losses
