"""LoRA's matrix products with hand-written gradients that recompute cheap intermediates instead of saving them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from backends.torch_backend.four_bit import base_products, dense_weights
from backends.torch_backend.gated import Activation, gated, gated_gradients
from backends.torch_backend.low_rank import Drawn, add, drawn, gradient_of_a, gradient_of_b, parts_of, put
from backends.torch_backend.masks import Mask


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
    mask: Mask | None  # dropout's
    unused: bool  # whether the output is left unwritten
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]


class Shared(NamedTuple):
    """One use of K layers of the same input."""

    calls: tuple[Call, ...]
    a: torch.Tensor  # that of all layers, one below the other [K * r, in]

    @property
    def scale(self) -> float:
        """That of all of them."""
        return self.calls[0].scale

    @property
    def dropped(self) -> bool:
        """Whether each layer sees an input of its own."""
        return self.calls[0].mask is not None


class Adapted(torch.autograd.Function):  # type: ignore[misc]
    """W x + scale * B A x of each of K layers, of x [..., in]. Saves x, or what x is made of, and scale * A x [N, K r].

    Autograd would save four products a layer, one of them as wide as W x. Shapes are changed in here: outside, each
    change would be an operation of its own, both ways.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shared: Shared, source: Source | None, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows = x.flatten(0, -2)
        low_rank = _low_rank(shared, rows)
        outs = _outputs(shared.calls, rows, parts_of(low_rank, len(shared.calls)))
        ctx.shared, ctx.again = shared, source and source.again
        if source:
            source.again.users += 1
        ctx.save_for_backward(low_rank, *(source.inputs if source else (x,)))
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        low_rank, *inputs = ctx.saved_tensors
        x = ctx.again(*inputs) if ctx.again else inputs[0]
        grads = [grad.flatten(0, -2) for grad in grad_outputs]
        masks = [drawn(call.mask, grad) for call, grad in zip(ctx.shared.calls, grads, strict=True)]
        grad_low_rank, of_factors = _adapter_gradients(ctx.shared, grads, x.flatten(0, -2), low_rank, masks)
        if not ctx.needs_input_grad[0]:
            return None, None, None, *of_factors
        grad_input = _input_gradient(ctx.shared, grads, grad_low_rank, masks)
        return grad_input.view(x.shape), None, None, *of_factors


class Gated(torch.autograd.Function):  # type: ignore[misc]
    """The same of one layer and x = activation(gate) * up, which the backward pass makes again (Shazeer, 2020)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: Activation,
        shared: Shared,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        rows = gated(activation, gate.flatten(0, -2), up.flatten(0, -2))
        low_rank = _low_rank(shared, rows)
        ctx.shared, ctx.activation = shared, activation
        ctx.save_for_backward(gate, up, low_rank)
        return _outputs(shared.calls, rows, [low_rank])[0].view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        gate, up, low_rank = ctx.saved_tensors
        shape, (gate, up, grad_output) = gate.shape, (x.flatten(0, -2) for x in (gate, up, grad_output))
        masks, grads = [drawn(ctx.shared.calls[0].mask, grad_output)], [grad_output]
        product = gated(ctx.activation, gate, up)
        grad_low_rank, of_factors = _adapter_gradients(ctx.shared, grads, product, low_rank, masks)
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, None, *of_factors
        grad = _input_gradient(ctx.shared, grads, grad_low_rank, masks)
        grad_gate, grad_up = gated_gradients(ctx.activation, gate, up, grad, product)
        return grad_gate.view(shape), grad_up.view(shape), None, None, *of_factors


Masks = Sequence[Drawn]


def _low_rank(shared: Shared, x: torch.Tensor) -> torch.Tensor:
    """scale * A x of all layers, beside each other [N, K r]."""
    out = x.new_empty(len(x), len(shared.a))
    if not shared.dropped:
        return put(out, x, shared.a.T, shared.scale)
    for part, call in zip(parts_of(out, len(shared.calls)), shared.calls, strict=True):
        put(part, x, call.a.T, shared.scale, drawn(call.mask, x))
    return out


def _outputs(calls: Sequence[Call], x: torch.Tensor, low_rank: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """W x + B low_rank of each layer [N, out]"""
    if calls[0].unused:
        return [x.new_empty(len(x), len(call.b)) for call in calls]
    bases = base_products([call.base for call in calls], x)
    return [add(out, low, call.b.T) for out, low, call in zip(bases, low_rank, calls, strict=True)]


def _adapter_gradients(
    shared: Shared, grads: Sequence[torch.Tensor], x: torch.Tensor, low_rank: torch.Tensor, masks: Masks
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """That of A x of all layers [N, K r], and those of each layer's A and B; the frozen weights have none."""
    count = len(shared.calls)
    grad_low_rank = torch.empty_like(low_rank)
    parts = parts_of(grad_low_rank, count)
    for part, grad, call in zip(parts, grads, shared.calls, strict=True):
        put(part, grad, call.b, shared.scale)
    if shared.dropped:
        of_a = [gradient_of_a(part, x, mask) for part, mask in zip(parts, masks, strict=True)]
    else:
        whole = gradient_of_a(grad_low_rank, x)
        of_a = [whole] if count == 1 else list(whole.chunk(count))
    of_b = [gradient_of_b(grad, part) for grad, part in zip(grads, parts_of(low_rank, count), strict=True)]
    return grad_low_rank, [factor for pair in zip(of_a, of_b, strict=True) for factor in pair]


def _input_gradient(
    shared: Shared, grads: Sequence[torch.Tensor], grad_low_rank: torch.Tensor, masks: Masks
) -> torch.Tensor:
    """[N, in]"""
    first, *others = dense_weights([call.base for call in shared.calls], grads[0].dtype)
    total = grads[0] @ first
    for grad, weight in zip(grads[1:], others, strict=True):
        total.addmm_(grad, weight)
    if not shared.dropped:
        return add(total, grad_low_rank, shared.a)
    for part, call, mask in zip(parts_of(grad_low_rank, len(masks)), shared.calls, masks, strict=True):
        add(total, part, call.a, mask)
    return total
