"""A LoRA layer's products with hand-written gradients: what is cheap to make again is not kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from backends.torch_backend.four_bit import base_product, dense

Draw = Callable[[], torch.Tensor]  # of dropout's mask [N, in]


class Again:
    """Makes a norm's result again in the backward pass, once for all layers that it went into."""

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        self._make, self.users = make, 0
        self._made: torch.Tensor | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        made = self._make(*inputs) if self._made is None else self._made
        self.users -= 1
        self._made = made if self.users > 0 else None
        return made


class Source(NamedTuple):
    """What a tensor is made of, where its maker saves that for its own gradient."""

    inputs: tuple[torch.Tensor, ...]
    again: Again


def source_of(x: torch.Tensor) -> Source | None:
    source: Source | None = getattr(x, "source", None)
    return source


class Call(NamedTuple):
    """One use of a layer. Nothing here is of the size of its input."""

    base: torch.nn.Linear
    scale: float  # dropout's is in it
    draw: Draw | None
    unused: bool  # whether the output is left unwritten
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]

    def mask(self) -> torch.Tensor | None:
        return self.draw and self.draw()


class Adapted(torch.autograd.Function):  # type: ignore[misc]
    """W x + scale * B A x, of x [..., in]. Saves x, or what x is made of, and scale * A x [N, r].

    Autograd would save four products, one of them as wide as W x. Shapes are changed in here: outside, each change
    would be an operation of its own, both ways.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, call: Call, source: Source | None
    ) -> torch.Tensor:
        out, low_rank = _output(call, x.flatten(0, -2))
        ctx.call, ctx.again = call, source and source.again
        if source:
            source.again.users += 1
        ctx.save_for_backward(low_rank, *(source.inputs if source else (x,)))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        low_rank, *inputs = ctx.saved_tensors
        x = ctx.again(*inputs) if ctx.again else inputs[0]
        mask, grad = ctx.call.mask(), grad_output.flatten(0, -2)
        grad_low_rank, grad_a, grad_b = _adapter_gradients(ctx.call, grad, x.flatten(0, -2), low_rank, mask)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None
        return _input_gradient(ctx.call, grad, grad_low_rank, mask).view(x.shape), grad_a, grad_b, None, None


class Gated(torch.autograd.Function):  # type: ignore[misc]
    """The same of x = silu(gate) * up, which the backward pass computes again (SwiGLU; Shazeer, 2020)."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, b: torch.Tensor, call: Call
    ) -> torch.Tensor:
        out, low_rank = _output(call, silu(gate).mul_(up).flatten(0, -2))
        ctx.call = call
        ctx.save_for_backward(gate, up, low_rank)
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        gate, up, low_rank = ctx.saved_tensors
        active, mask, grad_output = silu(gate), ctx.call.mask(), grad_output.flatten(0, -2)
        product = (active * up).flatten(0, -2)
        grad_low_rank, grad_a, grad_b = _adapter_gradients(ctx.call, grad_output, product, low_rank, mask)
        if not any(ctx.needs_input_grad[:2]):
            return None, None, grad_a, grad_b, None
        del product
        grad = _input_gradient(ctx.call, grad_output, grad_low_rank, mask).view(gate.shape)
        grad_up = active.mul_(grad)  # in place where it can be: these are the widest tensors of a block
        grad.mul_(up)
        grad_gate = torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
        return grad_gate, grad_up, grad_a, grad_b, None


def _output(call: Call, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + scale * B A x [N, out] and scale * A x [N, r], which its gradient needs beside x."""
    low_rank = (_dropped(x, call.mask()) @ call.a.T).mul_(call.scale)
    if call.unused:
        return x.new_empty(len(x), len(call.b)), low_rank
    return base_product(call.base, x).addmm_(low_rank, call.b.T), low_rank


def _adapter_gradients(
    call: Call, grad_output: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """That of A x [N, r], and those of A and B; the frozen weight has none."""
    grad_low_rank = (grad_output @ call.b).mul_(call.scale)
    grad_a = (grad_low_rank.T @ _dropped(x, mask)).float()
    return grad_low_rank, grad_a, (grad_output.T @ low_rank).float()


def _input_gradient(
    call: Call, grad_output: torch.Tensor, grad_low_rank: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[N, in]"""
    grad_input = grad_output @ dense(call.base, grad_output.dtype)
    if mask is None:
        return grad_input.addmm_(grad_low_rank, call.a)
    return grad_input.add_((grad_low_rank @ call.a).mul_(mask))


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask
