"""Whether own kernels run here: on a CUDA card, where Triton is there and they give what torch's operations give."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_FEW = 512  # rows: with fewer a kernel that takes them by tiles leaves most of a card idle


def kernels_for(x: torch.Tensor, rows: int) -> Any | None:
    """The module of kernels for so many rows of numbers like x; None: torch's own operations it is."""
    if not x.is_cuda or rows < _FEW:
        return None
    return kernels_on(x.device, x.dtype)


@cache
def kernels_on(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The module of kernels for this card and these numbers, tried before it is used; None: it does not work here."""
    if device.type != "cuda" or dtype == torch.float32:  # a card's products of float32 would be rounded
        return None
    try:
        from backends.torch_backend import triton_kernels

        with torch.inference_mode(), torch.random.fork_rng([device]):
            works = agrees(triton_kernels, device, dtype)
    except Exception:  # no Triton, none for this card, no compiler: as many errors as there are machines
        return None
    return triton_kernels if works else None


def agrees(kernels: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether each kernel gives what torch's operations give, of some random numbers."""
    torch.manual_seed(0)
    x, a, b, gate = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((70, 96), (24, 96), (80, 24), (70, 80))
    )
    low, out, gradient = x.new_empty(70, 24), gate.clone(), torch.empty(24, 96, device=device)
    pairs = [
        (kernels.down(low, x, a.T, 0.5), (0.5 * x.float() @ a.float().T)),
        (kernels.add_up(out, low, b.T), gate.float() + low.float() @ b.float().T),
        (kernels.gradient(gradient, low, x), low.float().T @ x.float()),
        (kernels.swiglu(gate, out), torch.nn.functional.silu(gate).mul_(out).float()),
        *_gated_pairs(kernels, gate, out),
        *_rotary_pairs(kernels, x[:10].view(2, 5, 3, 32).transpose(1, 2)),
    ]
    return all(_close(*pair) for pair in pairs)


def _gated_pairs(kernels: Any, gate: torch.Tensor, up: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    grad, grad_up = torch.randn_like(gate), torch.empty_like(gate)
    active = torch.nn.functional.silu(gate)
    expected = torch.ops.aten.silu_backward(grad * up, gate).float(), (active * grad).float()
    kernels.swiglu_back(gate, up, grad, grad_up)
    return [(grad, expected[0]), (grad_up, expected[1])]


def _rotary_pairs(kernels: Any, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin as some angles have them: the halves are alike."""
    half = torch.randn(1, 1, x.shape[2], x.shape[3] // 2, device=x.device)
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (half.cos(), half.sin()))
    turned, back = (
        torch.cat([-sign * x[..., x.shape[3] // 2 :], sign * x[..., : x.shape[3] // 2]], -1).float() for sign in (1, -1)
    )
    return [
        (kernels.rotate(x, cos, sin, False), x.float() * cos.float() + turned * sin.float()),
        (kernels.rotate(x, cos, sin, True), x.float() * cos.float() + back * sin.float()),
    ]


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 0.02 * float(expected.abs().mean())
    return bool(torch.allclose(result.float(), expected, rtol=0.02, atol=tolerance))
