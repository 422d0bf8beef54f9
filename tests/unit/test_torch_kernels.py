"""Our own kernels against torch's operations: on a CUDA card as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

from backends.torch_backend import four_bit, fused, low_rank, products, rotary  # noqa: E402
from backends.torch_backend.rotary import rotated  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
HALF = torch.float16  # the interpreter cuts bfloat16 off where a card rounds it


@pytest.fixture
def kernels() -> Any:
    """The module of kernels; conftest.py has the interpreter run them where there is no card."""
    return importlib.import_module("backends.torch_backend.triton_kernels")


def numbers(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize(("rows", "width", "rank"), [(70, 96, 24), (33, 200, 3), (5, 128, 130)])
def test_products_with_a_low_rank_side(kernels: Any, rows: int, width: int, rank: int) -> None:
    x, a = numbers(rows, width), numbers(rank, width)
    beside = torch.full((rows, rank + 8), float("nan"), dtype=HALF, device=DEVICE)
    low = beside[:, 4 : 4 + rank]  # a part of a wider tensor, as siblings have it
    expected = 0.5 * x.float() @ a.float().T
    torch.testing.assert_close(kernels.down(low, x, a.T, 0.5).float(), expected, rtol=1e-2, atol=1e-2)
    assert beside[:, :4].isnan().all() and beside[:, 4 + rank :].isnan().all()

    out, b = numbers(rows, width), numbers(width, rank)
    expected = out.float() + low.float() @ b.float().T
    torch.testing.assert_close(kernels.add_up(out, low, b.T).float(), expected, rtol=1e-2, atol=1e-1)

    for strides in ((width, 1), (1, rank)):
        gradient = torch.empty_strided((rank, width), strides, device=DEVICE)
        kernels.gradient(gradient, low, x)
        torch.testing.assert_close(gradient, low.float().T @ x.float(), rtol=1e-3, atol=1e-2)


def test_a_gated_layer_is_two_operations_in_one(kernels: Any) -> None:
    gate, up, grad = numbers(9, 130), numbers(10, 129)[:9, :].repeat(1, 2)[:, :130].contiguous(), numbers(9, 130) * 2
    active = torch.nn.functional.silu(gate)
    assert torch.equal(kernels.swiglu(gate, up), active * up)
    expected = torch.ops.aten.silu_backward(grad * up, gate), active * grad
    grad_up = torch.empty_like(gate)
    kernels.swiglu_back(gate, up, grad, grad_up)
    for found, right in zip((grad, grad_up), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batches", [1, 2])
def test_heads_turn_as_torch_turns_them(kernels: Any, batches: int) -> None:
    """Heads that lie by token, as layers make them; angles of each row, or of all."""
    x = numbers(2, 5, 3, 16).transpose(1, 2).requires_grad_()
    angle = numbers(batches, 5, 8, dtype=torch.float32)
    cos, sin = (torch.cat([part, part], -1).to(HALF) for part in (angle.cos(), angle.sin()))
    expected = rotated(x, x, cos.expand(2, -1, -1), sin.expand(2, -1, -1))[0]
    upstream = numbers(2, 3, 5, 16)
    (grad,) = torch.autograd.grad(expected, x, upstream)
    cos, sin = cos[:, None], sin[:, None]
    torch.testing.assert_close(kernels.rotate(x.detach(), cos, sin, False), expected.detach(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(kernels.rotate(upstream, cos, sin, True), grad, rtol=2e-3, atol=2e-3)


def layer(out: int, inputs: int, seed: int) -> Linear4bit:
    made = Linear4bit(inputs, out, bias=False, compute_dtype=HALF, quant_type="nf4")
    weight = numbers(out, inputs + seed)[:, :inputs].contiguous().cpu()
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return made.to(DEVICE)


def test_weights_of_siblings_are_unpacked_together(kernels: Any) -> None:
    layers = [layer(out, 128, seed=out) for out in (128, 256, 384)]
    before = [dequantize_4bit(one.weight.data, one.weight.quant_state) for one in layers]
    together = four_bit.Together(layers)
    found = together.weights(HALF, kernels)
    for one, weight, expected in zip(layers, found, before, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)
        assert torch.equal(dequantize_4bit(one.weight.data, one.weight.quant_state), expected)  # its own parts still
    assert together.is_of(layers) and not together.is_of(layers[:2]) and not together.is_of(layers[::-1])


def results(make: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a function gives, and the gradients of its inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outs = make(*leaves)
    upstream = [numbers(*out.shape) * 0.3 for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def test_adapted_layers_compute_the_same_with_kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of one 4-bit input, and the layer that ends a gated one: outputs and all gradients."""
    layers = [layer(out, 128, seed=out) for out in (128, 256, 256)]
    x, gate, up = numbers(2, 20, 128), numbers(2, 20, 128), numbers(20, 2, 128).view(2, 20, 128)
    factors = [numbers(8, 128), numbers(128, 8), numbers(8, 128), numbers(256, 8), numbers(8, 128), numbers(256, 8)]
    factors = [factor * 0.1 for factor in factors]

    def calls(used: list[Linear4bit], parameters: list[torch.Tensor]) -> Any:
        halves = [parameter.detach() for parameter in parameters]
        made = [products.Call(one, 2.0, None, False, halves[2 * n], halves[2 * n + 1]) for n, one in enumerate(used)]
        return products.Shared(tuple(made), torch.cat(halves[::2]))

    def siblings(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return products.Adapted.apply(x, calls(layers, [*parameters]), None, *parameters)

    def gated(gate: torch.Tensor, up: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return [products.Gated.apply(gate, up, calls(layers[:1], [*parameters]), *parameters)]

    for make, inputs in ((siblings, [x, *factors]), (gated, [gate, up, *factors[:2]])):
        expected = results(make, inputs)
        with monkeypatch.context() as patch:
            used = []
            for module in (products, low_rank):
                patch.setattr(module, "kernels_for", lambda x, rows, used=used: used.append(rows) or kernels)
            patch.setattr(four_bit, "kernels_on", lambda device, dtype: kernels)
            patch.setattr(four_bit, "_FEW", -1)
            found = results(make, inputs)
        assert set(used) == {40}
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().mean()))


def test_numbers_that_lie_apart_are_read_as_they_are(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose numbers are columns of another tensor; a gate, an up or a sine that does not lie as kernels read."""
    x, a, low = numbers(96, 40).T, numbers(8, 96), numbers(40, 8)
    expected = (
        low_rank.put(x.new_empty(40, 8), x, a.T, 0.5),
        low_rank.gradient_of_a(low, x),
        low_rank.gradient_of_b(x, low),
    )
    monkeypatch.setattr(low_rank, "kernels_for", lambda x, rows: kernels)
    found = (
        low_rank.put(x.new_empty(40, 8), x, a.T, 0.5),
        low_rank.gradient_of_a(low, x),
        low_rank.gradient_of_b(x, low),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-1)

    monkeypatch.setattr(products, "kernels_for", lambda x, rows: kernels)
    gate = numbers(40, 96)
    assert products._kernels_of(gate, gate) is kernels
    assert products._kernels_of(gate, x) is None and products._kernels_of(x, gate) is None
    monkeypatch.setattr(rotary, "kernels_for", lambda x, rows: kernels)
    heads, angles = numbers(2, 3, 5, 16), numbers(2, 1, 5, 16)
    assert rotary._kernels_for(heads, angles, angles) is kernels
    assert rotary._kernels_for(heads, angles, numbers(2, 1, 5, 32)[..., :16]) is None


def test_a_card_s_kernels_are_tried_before_they_are_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.agrees(kernels, DEVICE, HALF)
    for name in ("down", "add_up", "gradient", "swiglu", "swiglu_back", "rotate"):
        with monkeypatch.context() as patch:
            real = getattr(kernels, name)

            def wrong(*arguments: Any, real: Any = real) -> Any:
                result = real(*arguments)
                (arguments[2] if result is None else result).mul_(1.1)
                return result

            patch.setattr(kernels, name, wrong)
            assert not fused.agrees(kernels, DEVICE, HALF), name


def test_the_kernels_compile_for_cards_old_and_new() -> None:
    """Turing's, Ada's and Blackwell's compute capabilities; Triton needs no card for it, and no interpreter."""
    without_interpreter("compile_kernels.py", "75", "89", "120")


@pytest.mark.parametrize("cases", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kernel_that_was_kept_is_the_one_that_triton_chooses(cases: int) -> None:
    """Sizes, strides and addresses of many kinds: no two of Triton's choices are kept under one key."""
    without_interpreter("kept_kernels.py", str(cases))


def without_interpreter(script: str, *arguments: str) -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / script), *arguments]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_card_torch_computes() -> None:
    assert fused.kernels_on(torch.device("cpu"), torch.bfloat16) is None
    assert fused.kernels_for(torch.ones(2000, 4, dtype=torch.bfloat16), 2000) is None


@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
def test_on_a_card_the_kernels_work_and_unpack_to_the_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert fused.kernels_on(DEVICE, dtype) is not None
    assert fused.kernels_on(DEVICE, torch.float32) is None
    weight = torch.randn(512, 256, device=DEVICE, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    made = Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    made.weight = Params4bit.from_prequantized(packed, state.as_dict(packed=True), device=DEVICE)
    expected = dequantize_4bit(packed, state)
    assert four_bit.unpack_together([made])
    assert torch.equal(four_bit.dense_weights([made], torch.bfloat16)[0], expected)
