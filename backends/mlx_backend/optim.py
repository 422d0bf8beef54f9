"""AdamW in MLX."""

from __future__ import annotations

import mlx.core as mx

from backends.adapter_state import MOMENTS
from backends.interface import OptimSpec

Tensors = dict[str, mx.array]


def adamw(
    adapter: Tensors, moments: Tensors, gradient: Tensors, norm: float, step: int, lr: float, optim: OptimSpec
) -> tuple[Tensors, Tensors]:
    """Adapter and moments after step number `step`, from 1, with the clipped gradient whose norm was `norm`.

    Loshchilov & Hutter, 2019, algorithm 2.
    """
    clip, (beta1, beta2) = optim.clip_norm, optim.betas
    scale = clip / (norm + 1e-6) if clip is not None and norm > clip else 1.0
    new: Tensors = {}
    later: Tensors = {}
    for name, value in adapter.items():
        slope = gradient[name] * scale
        first, second = (f"{name}.{kind}" for kind in MOMENTS)
        later[first] = beta1 * moments[first] + (1 - beta1) * slope
        later[second] = beta2 * moments[second] + (1 - beta2) * mx.square(slope)
        mean, square = later[first] / (1 - beta1**step), later[second] / (1 - beta2**step)
        decayed = value - lr * optim.weight_decay * value
        new[name] = decayed - lr * mean / (mx.sqrt(square) + optim.eps)
    return new, later
