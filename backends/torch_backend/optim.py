"""AdamW on the trainable tensors. An update is applied whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from backends.adapter_state import MOMENTS
from backends.interface import FloatArray, OptimSpec
from backends.team import Team
from backends.torch_backend.lora import Parameters

_NUMBERS = 2**22  # updated at a time


class _Group(NamedTuple):
    """Some of the adapter's tensors."""

    names: list[str]
    weights: list[torch.Tensor]
    grads: list[torch.Tensor]


class AdamW:
    """The update of `reference.clipped` and `reference.adamw`."""

    def __init__(self, adapter: Parameters, spec: OptimSpec) -> None:
        self._adapter, self._spec = adapter, spec
        self.moments: dict[str, torch.Tensor] = {}

    def set_moments(self, moments: Mapping[str, FloatArray]) -> None:
        """In the place of those that are there, so that they are never held twice."""
        for name, value in moments.items():
            if name not in self.moments:
                like = self._adapter[name.rpartition(".")[0]]
                self.moments[name] = torch.empty_like(like, dtype=torch.float32, requires_grad=False)
            self.moments[name].copy_(torch.from_numpy(value))

    def divide_grads(self, scale: float) -> None:
        """By the scale that the loss was multiplied by."""
        if scale != 1:
            torch._foreach_div_([weight.grad for weight in self._adapter.values() if weight.grad is not None], scale)

    def sum_grads(self, team: Team, loss: torch.Tensor, lr: float) -> tuple[torch.Tensor, float]:
        """Every gradient becomes its sum over the processes. Returns the sum of their losses, and the step's rate."""
        weights = list(self._adapter.values())
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        (*summed, loss), lr = team.sum([*grads, loss.float()], lr)
        for weight, grad in zip(weights, summed, strict=True):
            weight.grad = grad
        return loss, lr

    def update(self, number: int, lr: float, loss: torch.Tensor) -> tuple[float, float]:
        """Step `number`, from 1. Returns the loss and the gradient's norm, read together: the one wait for a GPU.

        A norm that is NaN: something was not finite, and nothing changed.
        """
        weights = list(self._adapter.values())
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self._spec.clip_norm is not None:
            torch._foreach_mul_(grads, torch.clamp(self._spec.clip_norm / (norm + 1e-6), max=1.0))
        groups = list(self._groups(grads))
        updated = [tensor for group in groups for tensor in self._updated(group, number, lr)]
        largest = torch.stack(torch._foreach_norm(updated, float("inf"))).max()
        loss_read, norm_read, largest_read = torch.stack([loss.float(), norm, largest]).tolist()
        if not np.isfinite([loss_read, norm_read, largest_read]).all():
            return loss_read, float("nan")
        for group in groups:
            self._move(self._moments(group), group.grads)
        torch._foreach_copy_(weights, updated)
        return loss_read, norm_read

    def _groups(self, grads: list[torch.Tensor]) -> Iterator[_Group]:
        """Tensors of about so many numbers at a time, so that what an update makes beside them stays small."""
        group, size = _Group([], [], []), 0
        for (name, weight), grad in zip(self._adapter.items(), grads, strict=True):
            for part, value in zip(group, (name, weight, grad), strict=True):
                part.append(value)
            size += weight.numel()
            if size >= _NUMBERS:
                yield group
                group, size = _Group([], [], []), 0
        if size:
            yield group

    def _moments(self, group: _Group) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        first, second = ([self.moments[f"{name}.{kind}"] for name in group.names] for kind in MOMENTS)
        return first, second

    def _move(self, moments: tuple[list[torch.Tensor], list[torch.Tensor]], grads: list[torch.Tensor]) -> None:
        """Both moments towards the gradient and its square, in place."""
        (first, second), (beta1, beta2) = moments, self._spec.betas
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)

    def _updated(self, group: _Group, number: int, lr: float) -> list[torch.Tensor]:
        """The weights of a group after the step; weights and moments themselves are left as they are."""
        beta1, beta2 = self._spec.betas
        first, second = (torch._foreach_mul(moments, 1.0) for moments in self._moments(group))
        self._move((first, second), group.grads)
        torch._foreach_div_(second, 1 - beta2**number)
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, self._spec.eps)
        torch._foreach_div_(first, 1 - beta1**number)
        updated: list[torch.Tensor] = torch._foreach_mul(group.weights, 1 - lr * self._spec.weight_decay)
        torch._foreach_addcdiv_(updated, first, second, -lr)
        return updated
