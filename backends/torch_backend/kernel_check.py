"""Whether our CUDA kernels give what torch's operations give, of some random numbers on this card."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from backends.torch_backend.masks import Mask

_Pair = tuple[torch.Tensor, torch.Tensor]  # what a kernel gives, and what it should
_RANK = 48  # of the largest tiles, which need most of a card's fast memory


def agrees(kernels: Any, device: torch.device, dtype: torch.dtype) -> bool:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, gate, up = draw(70, 96), draw(70, 80), draw(70, 80)
    words = [torch.randint(-(2**31), 2**31, (size,), device=device, dtype=torch.int32) for size in (72, 48)]
    mask = Mask(words[0][:70], words[1], 96, 0)
    pairs = chain(
        _products(kernels, x, draw(_RANK, 96), draw(_RANK, 96), draw(70, 96), mask),
        _gated(kernels, gate, up, draw(70, 80), gelu=False),
        _gated(kernels, gate, up, draw(70, 80), gelu=True),
        _norms(kernels, x, draw(96), draw(70, 96)),
        _losses(kernels, draw(7, 5000) * 3, None),
        _losses(kernels, draw(7, 5000) * 3, 3.0),
        _rotary(kernels, x[:10].view(2, 5, 3, 32).transpose(1, 2)),
    )
    return all(_close(*pair) for pair in pairs)


def _products(
    kernels: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, mask: Mask
) -> Iterator[_Pair]:
    for used, kept in ((None, 1.0), (mask, mask.drawn().float())):
        low, before = kernels.down(x.new_empty(len(x), len(a)), x, a.T, 0.5, used), out.float()
        yield low, 0.5 * (x.float() * kept) @ a.float().T
        yield kernels.add_up(out, low, b, used), before + low.float() @ b.float() * kept
        found = kernels.gradient(torch.empty(a.shape, device=a.device), low, x, used)
        yield found, low.float().T @ (x.float() * kept)


def _gated(kernels: Any, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, gelu: bool) -> Iterator[_Pair]:
    kind, named = (torch.ops.aten.gelu, {"approximate": "tanh"}) if gelu else (torch.ops.aten.silu, {})
    back = torch.ops.aten.gelu_backward if gelu else torch.ops.aten.silu_backward
    active, grad_up = kind(gate, **named), torch.empty_like(gate)
    by_gate, by_up = back(grad * up, gate, **named).float(), (active * grad).float()
    yield kernels.gated(gate, up, gelu), (active * up).float()
    kernels.gated_back(gate, up, grad, grad_up, gelu)
    yield grad, by_gate
    yield grad_up, by_up


def _norms(kernels: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Iterator[_Pair]:
    numbers, gain = x.float(), weight.float() + 1.0
    inverse = (numbers.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normed, by_normed = numbers * inverse, grad.float() * gain
    out, inverse_rms = kernels.rms_norm(x, weight, 1e-6, 1.0)
    yield out, normed * gain
    yield inverse_rms, inverse
    expected = (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True)) * inverse
    yield kernels.rms_norm_back(x, weight, inverse_rms, grad, 1.0), expected


def _losses(kernels: Any, logits: torch.Tensor, cap: float | None) -> Iterator[_Pair]:
    targets, shares = (torch.arange(len(logits), device=logits.device) + start for start in (4093, 1))
    z = logits.float() * 0.5
    z = z if cap is None else cap * torch.tanh(z / cap)
    logs, chosen = torch.log_softmax(z, -1), targets[:, None]
    grad = (logs.exp() - torch.zeros_like(logs).scatter_(1, chosen, 1.0)) * shares[:, None] * 0.5
    expected = grad if cap is None else grad * (1 - (z / cap).square())
    yield kernels.cross_entropy(logits, targets, shares.float(), 0.5, cap), -shares * logs.gather(1, chosen)[:, 0]
    yield logits, expected


def _rotary(kernels: Any, x: torch.Tensor) -> Iterator[_Pair]:
    """cos and sin as some angles have them: the halves are alike."""
    half, width = torch.randn(1, 1, x.shape[2], x.shape[3] // 2, device=x.device), x.shape[3] // 2
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (half.cos(), half.sin()))
    for back, sign in ((False, 1), (True, -1)):
        turned = torch.cat([-sign * x[..., width:], sign * x[..., :width]], -1).float()
        yield kernels.rotate(x, cos, sin, back), x.float() * cos.float() + turned * sin.float()


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 0.02 * float(expected.abs().mean())
    return bool(torch.allclose(result.float(), expected, rtol=0.02, atol=tolerance))
