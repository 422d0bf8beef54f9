"""Adapted layers of one input are computed together, whoever asks for which."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from backends.interface import LoraSpec  # noqa: E402
from backends.torch_backend import low_rank  # noqa: E402
from backends.torch_backend.lora import LoraLinear  # noqa: E402
from tests.conformance.toy import random_adapter, toy_batch  # noqa: E402
from tests.tiny_models import tiny_llama  # noqa: E402
from tests.unit.test_torch_backend import opened  # noqa: E402


def test_layers_of_one_input_are_computed_together_and_as_alone(tmp_path: Path) -> None:
    """Queries, keys and values of an input come of one low-rank product; asked for in any order, or for one alone."""
    session = opened(tiny_llama(tmp_path / "llama"), LoraSpec(4, 8.0))
    session.set_state(random_adapter(session))
    attention = session._model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert len({id(layer.siblings) for layer in layers}) == 1
    x, other = torch.randn(2, 5, layers[0].base.in_features), torch.randn(1, 3, layers[0].base.in_features)

    def alone(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        return layer.base(x) + layer._scale * (x @ layer.lora_A.T @ layer.lora_B.T)

    for layer in (layers[2], layers[0], layers[1], layers[0], layers[0]):
        torch.testing.assert_close(layer(x), alone(layer, x))
    torch.testing.assert_close(layers[1](other), alone(layers[1], other))  # what waited for x is let go
    torch.testing.assert_close(layers[2](x), alone(layers[2], x))


def test_no_sibling_waits_after_a_step(tmp_path: Path) -> None:
    session = opened(tiny_llama(tmp_path / "llama"), LoraSpec(4, 8.0))
    session.step([toy_batch()], 1e-2)
    assert not any(module.siblings._waiting for module in session._model.modules() if isinstance(module, LoraLinear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_written_to_is_not_read_before(dtype: torch.dtype) -> None:
    """A low-rank product goes into memory that holds anything, numbers that are none among it."""
    x, a = torch.ones(3, 8, dtype=dtype), torch.full((4, 8), 0.5, dtype=dtype)
    left = torch.full((3, 8), float("nan"), dtype=dtype)[:, 2:6]
    assert torch.equal(low_rank.put(left, x, a.T, 2.0), torch.full((3, 4), 8.0, dtype=dtype))


def test_a_gradient_is_summed_in_float32() -> None:
    half = torch.randn(32, 16).to(torch.bfloat16)
    found = low_rank.float32_product(half, half.T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, half.float() @ half.float().T, rtol=1e-2, atol=0.1)
