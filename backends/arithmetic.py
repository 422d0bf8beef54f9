"""The training step's formulas in numpy, used by the reference backend and by tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.interface import FloatArray, OptimSpec

Arrays = dict[str, FloatArray]


def clipped(grads: Arrays, limit: float | None) -> tuple[float, Arrays]:
    """The global norm, and the gradients times limit / (norm + 1e-6) where it is above the limit (Pascanu, 2013)."""
    norm = float(np.sqrt(sum(float(np.sum(np.square(grad))) for grad in grads.values())))
    if limit is None or not norm > limit:
        return norm, grads
    return norm, {name: grad * np.float32(limit / (norm + 1e-6)) for name, grad in grads.items()}


def adamw(
    weight: FloatArray, grad: FloatArray, m: FloatArray, v: FloatArray, number: int, lr: float, optim: OptimSpec
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """New weight, exp_avg and exp_avg_sq after optimiser step `number`, counted from 1 (Loshchilov & Hutter, 2019)."""
    beta1, beta2 = optim.betas
    m = m * beta1 + grad * (1 - beta1)
    v = v * beta2 + grad * grad * (1 - beta2)
    m_hat, v_hat = m / (1 - beta1**number), v / (1 - beta2**number)
    updated: Any = weight * (1 - lr * optim.weight_decay) - lr * m_hat / (np.sqrt(v_hat) + optim.eps)
    return updated, m, v


def log_softmax(logits: FloatArray) -> FloatArray:
    """Of the last axis."""
    shifted: FloatArray = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
