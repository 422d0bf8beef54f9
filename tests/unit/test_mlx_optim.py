"""The update in MLX: compiled for a GPU, it is the same update, and one compilation serves all steps."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from backends import reference  # noqa: E402
from backends.interface import OptimSpec  # noqa: E402
from backends.mlx_backend.optim import AdamW  # noqa: E402

SHAPES = {"a.lora_A": (5, 3), "a.lora_B": (3, 7), "b.lora_A": (2, 3)}


def made(seed: int, kinds: tuple[str, ...] = ("",)) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    values = {f"{name}{kind}": random.normal(size=shape) for name, shape in SHAPES.items() for kind in kinds}
    return {name: value.astype(np.float32) for name, value in values.items()}


def updated(update: AdamW, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    with mx.stream(mx.cpu):
        adapter = {name: mx.array(value) for name, value in made(0).items()}
        moments = {name: mx.array(value * 0) for name, value in made(1, kinds=(".exp_avg", ".exp_avg_sq")).items()}
        for step in range(1, steps + 1):
            grads = {name: mx.array(value) for name, value in made(step + 1).items()}
            norm = float(mx.sqrt(sum(mx.square(grad).sum() for grad in grads.values())))
            adapter, moments = update(adapter, moments, grads, norm, step, 1e-2 / step)
            mx.eval(adapter, moments)
        return {name: np.array(value) for name, value in adapter.items()}, {k: np.array(v) for k, v in moments.items()}


@pytest.mark.parametrize(
    ("spec", "compiled"),
    [(OptimSpec(), False), (OptimSpec(weight_decay=0.1, clip_norm=None), False), (OptimSpec(weight_decay=0.1), True)],
)
def test_the_update_is_the_references(spec: OptimSpec, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and shutil.which("g++") is None and sys.platform == "linux":
        pytest.skip("MLX compiles for a CPU with g++, which is not here")
    traced: list[int] = []
    plain = AdamW._updated
    monkeypatch.setattr(AdamW, "_updated", lambda *given: (traced.append(1), plain(*given))[1])
    ours = updated(AdamW(spec, compiled), 3)
    assert len(traced) == (1 if compiled else 3)
    adapter, moments = made(0), {k: v * 0 for k, v in made(1, kinds=(".exp_avg", ".exp_avg_sq")).items()}
    for step in range(1, 4):
        _, grads = reference.clipped(made(step + 1), spec.clip_norm)
        for name in SHAPES:
            first, second = f"{name}.exp_avg", f"{name}.exp_avg_sq"
            adapter[name], moments[first], moments[second] = reference.adamw(
                adapter[name], grads[name], moments[first], moments[second], step, 1e-2 / step, spec
            )
    for found, expected in zip(ours, (adapter, moments), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6)
