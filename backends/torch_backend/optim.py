"""AdamW on the adapter's tensors, all or nothing."""

from __future__ import annotations

import numpy as np
import torch

from backends.interface import OptimSpec
from backends.torch_backend.lora import Parameters


class AdamW:
    """The update of `reference.clipped` and `reference.adamw`."""

    def __init__(self, adapter: Parameters, spec: OptimSpec) -> None:
        self._adapter, self._spec = adapter, spec
        self.moments: dict[str, torch.Tensor] = {}

    def divide_grads(self, scale: float) -> None:
        """By the scale that the loss was multiplied by."""
        if scale != 1:
            torch._foreach_div_([weight.grad for weight in self._adapter.values() if weight.grad is not None], scale)

    def update(self, number: int, lr: float) -> float:
        """Step `number`, from 1. Returns the gradient's norm; NaN: a number was not finite, and nothing changed."""
        names = list(self._adapter)
        weights = [self._adapter[name] for name in names]
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        clip = self._spec.clip_norm
        if clip is not None and norm > clip:
            torch._foreach_mul_(grads, clip / (norm + 1e-6))
        beta1, beta2 = self._spec.betas
        first = torch._foreach_mul([self.moments[f"{name}.exp_avg"] for name in names], beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        second = torch._foreach_mul([self.moments[f"{name}.exp_avg_sq"] for name in names], beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_div(second, 1 - beta2**number)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, self._spec.eps)
        updated = torch._foreach_mul(weights, 1 - lr * self._spec.weight_decay)
        torch._foreach_addcdiv_(updated, torch._foreach_div(first, 1 - beta1**number), denominator, -lr)
        if not np.isfinite(norm) or not torch.stack([tensor.isfinite().all() for tensor in updated]).all():
            return float("nan")
        torch._foreach_copy_(weights, updated)
        for name, m, v in zip(names, first, second, strict=True):
            self.moments[f"{name}.exp_avg"], self.moments[f"{name}.exp_avg_sq"] = m, v
        return norm
