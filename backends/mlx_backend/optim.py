"""AdamW in MLX."""

from __future__ import annotations

import mlx.core as mx

from backends.adapter_state import MOMENTS
from backends.interface import OptimSpec

Tensors = dict[str, mx.array]


def adamw(
    adapter: Tensors, moments: Tensors, grads: Tensors, norm: float, step: int, lr: float, optim: OptimSpec
) -> tuple[Tensors, Tensors]:
    """Adapter and moments after step number `step`, from 1, with the clipped gradients whose global norm was `norm`.

    Loshchilov & Hutter, 2019, algorithm 2.
    """
    clip, (beta1, beta2) = optim.clip_norm, optim.betas
    scale = clip / (norm + 1e-6) if clip is not None and norm > clip else 1.0
    new_adapter: Tensors = {}
    new_moments: Tensors = {}
    for name, value in adapter.items():
        grad = grads[name] * scale
        first, second = (f"{name}.{kind}" for kind in MOMENTS)
        new_moments[first] = beta1 * moments[first] + (1 - beta1) * grad
        new_moments[second] = beta2 * moments[second] + (1 - beta2) * mx.square(grad)
        mean, square = new_moments[first] / (1 - beta1**step), new_moments[second] / (1 - beta2**step)
        decayed = value - lr * optim.weight_decay * value
        new_adapter[name] = decayed - lr * mean / (mx.sqrt(square) + optim.eps)
    return new_adapter, new_moments
