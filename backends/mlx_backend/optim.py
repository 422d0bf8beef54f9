"""AdamW in MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from backends.adapter_state import MOMENTS
from backends.interface import OptimSpec

Tensors = dict[str, mx.array]


class AdamW:
    """Loshchilov & Hutter, 2019, algorithm 2."""

    def __init__(self, optim: OptimSpec, compiled: bool) -> None:
        """compiled: as few kernels, made anew for these tensors. On a CPU a C++ compiler would have to run for them."""
        self._optim = optim
        self._update = mx.compile(self._updated) if compiled else self._updated

    def __call__(
        self, adapter: Tensors, moments: Tensors, grads: Tensors, norm: float, step: int, lr: float
    ) -> tuple[Tensors, Tensors]:
        """Adapter and moments after step number `step`, from 1; `norm` is the gradients' before clipping."""
        clip, (beta1, beta2) = self._optim.clip_norm, self._optim.betas
        scale = clip / (norm + 1e-6) if clip is not None and norm > clip else 1.0
        # arrays and not numbers, which would be part of what is compiled
        changing = [scale, 1 - beta1**step, 1 - beta2**step, lr, lr * self._optim.weight_decay]
        return self._update(adapter, moments, grads, [mx.array(value, mx.float32) for value in changing])

    def _updated(
        self, adapter: Tensors, moments: Tensors, grads: Tensors, changing: Sequence[mx.array]
    ) -> tuple[Tensors, Tensors]:
        scale, correction1, correction2, lr, decay = changing
        beta1, beta2 = self._optim.betas
        new_adapter: Tensors = {}
        new_moments: Tensors = {}
        for name, value in adapter.items():
            grad = grads[name] * scale
            first, second = (f"{name}.{kind}" for kind in MOMENTS)
            new_moments[first] = beta1 * moments[first] + (1 - beta1) * grad
            new_moments[second] = beta2 * moments[second] + (1 - beta2) * mx.square(grad)
            mean, square = new_moments[first] / correction1, new_moments[second] / correction2
            new_adapter[name] = value - decay * value - lr * mean / (mx.sqrt(square) + self._optim.eps)
        return new_adapter, new_moments
