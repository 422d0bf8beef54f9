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
import numpy as np  # noqa: E402
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

from backends.dropout import places  # noqa: E402
from backends.torch_backend import (  # noqa: E402
    four_bit,
    fused,
    gated,
    kernel_check,
    low_rank,
    norms,
    products,
    rotary,
)
from backends.torch_backend import head as torch_head  # noqa: E402
from backends.torch_backend.gated import ACTIVATIONS  # noqa: E402
from backends.torch_backend.head import Head  # noqa: E402
from backends.torch_backend.masks import Dropout  # noqa: E402
from backends.torch_backend.rotary import rotated  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SLOW = pytest.mark.slow
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


def masks(modules: dict[str, tuple[int, int]], rows: int) -> Dropout:
    made = Dropout(0.4, 0, modules, DEVICE)
    made.at(3, places([0], np.zeros(1, int), rows, 0))
    return made


@pytest.mark.parametrize(("rows", "width", "rank"), [(70, 96, 24), (33, 201, 3)])
def test_products_draw_dropouts_masks_themselves(kernels: Any, rows: int, width: int, rank: int) -> None:
    """To the bit where `backends.dropout` keeps an input: ones, and a factor that reads one input."""
    made = masks({"a": (8, width), "b": (8, width)}, rows)
    x, low = torch.ones(rows, width, dtype=HALF, device=DEVICE), torch.ones(rows, rank, dtype=HALF, device=DEVICE)
    one = torch.zeros(rank, width, dtype=HALF, device=DEVICE)
    one[0] = 1
    for module in (0, 1):
        mask = made.mask(module, x)
        kept = mask.drawn().float()
        found = kernels.down(torch.empty_like(low), x, torch.ones_like(one).T, 1.0, mask)
        assert torch.equal(found[:, 0].float(), kept.sum(1)) and 0.5 < kept.mean() < 0.7
        assert torch.equal(kernels.add_up(torch.zeros_like(x), low, one, mask).float(), kept)
        gradient = kernels.gradient(torch.empty(rank, width, device=DEVICE), low, x, mask)
        assert torch.equal(gradient[0], kept.sum(0))


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gated_layer_is_two_operations_in_one(kernels: Any, gelu: bool) -> None:
    activation = ACTIVATIONS["gelu_pytorch_tanh" if gelu else "silu"]
    gate, up, grad = numbers(9, 130), numbers(10, 129)[:9, :].repeat(1, 2)[:, :130].contiguous(), numbers(9, 130) * 2
    torch.testing.assert_close(kernels.gated(gate, up, gelu), activation.of(gate) * up, rtol=2e-3, atol=0)
    leaves = [x.float().requires_grad_() for x in (gate, up)]
    expected = torch.autograd.grad(activation.of(leaves[0]) * leaves[1], leaves, grad.float())
    grad_up = torch.empty_like(gate)
    kernels.gated_back(gate, up, grad, grad_up, gelu)
    for found, right in zip((grad, grad_up), expected, strict=True):
        torch.testing.assert_close(found.float(), right, rtol=4e-3, atol=4e-3)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("width", [50, 4096, 9001])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
def test_the_loss_of_logits_and_its_gradient(
    kernels: Any, scale: float, cap: float | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a head that computes with torch's operations, and with a kernel; rows of share 0 have no gradient."""
    linear = torch.nn.Linear(16, width, device=DEVICE, dtype=HALF).requires_grad_(False)
    states, shares = numbers(11, 16) * 20, torch.linspace(0, 0.3, 11, device=DEVICE)
    targets = torch.arange(11, device=DEVICE) * (width - 1) // 10
    head = Head(linear, 4 * width, scale, cap)
    expected = head.loss(states, targets, shares)
    monkeypatch.setattr(torch_head, "kernels_on", lambda device, dtype: kernels)
    loss, grad = head.loss(states, targets, shares)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected[1], rtol=1e-2, atol=1e-2 * float(expected[1].abs().mean()))
    assert not grad[0].any() and grad[1:].any(-1).all()
    states[3] = float("nan")
    assert head.loss(states, targets, shares)[0].isnan()


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("width", "added"), [(96, 1.0), (130, 0.0)])
def test_a_norm_is_what_torch_computes_with_its_gradient(kernels: Any, width: int, added: float, by_head: bool) -> None:
    x, weight, upstream = numbers(2, 5, 3, width) * 3, numbers(width), numbers(2, 5, 3, width)
    if by_head:  # heads that lie by token, and a gradient that does not
        x, upstream = x.transpose(1, 2), upstream.transpose(1, 2).contiguous()
    leaf = x.float().requires_grad_()
    inverse = (leaf.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = leaf * inverse * (weight.float() + added)
    (grad,) = torch.autograd.grad(expected, leaf, upstream.float())
    out, inverse_rms = kernels.rms_norm(x, weight, 1e-6, added)
    torch.testing.assert_close(out.float(), expected.detach(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(inverse_rms, inverse.detach(), rtol=1e-4, atol=1e-5)
    assert out.stride() == x.stride()
    found = kernels.rms_norm_back(x, weight, inverse_rms, upstream, added)
    torch.testing.assert_close(found.float(), grad, rtol=4e-3, atol=4e-3)


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


def test_a_model_s_norm_is_the_same_with_kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, gain = numbers(2, 5, 3, 96).transpose(1, 2), numbers(96), norms.Gain(added=1.0)

    def normed(x: torch.Tensor) -> list[torch.Tensor]:
        out, inverse_rms = norms._RmsNorm.apply(x, weight, 1e-6, gain)
        assert torch.equal(norms._again(x.detach(), inverse_rms, weight, 1e-6, gain), out.detach())
        return [out]

    expected, used = results(normed, [x]), []
    monkeypatch.setattr(norms, "kernels_for", lambda x, rows: used.append(rows) or kernels)
    for ours, theirs in zip(results(normed, [x]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert set(used) == {30}
    assert norms._kernels(x[..., :5], weight, gain) is None  # rows that lie apart
    assert norms._kernels(x, None, gain) is None and norms._kernels(x, weight, norms.Gain(rounded_first=True)) is None


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


@pytest.mark.parametrize("dropping", [False, True])
def test_adapted_layers_compute_the_same_with_kernels(
    kernels: Any, dropping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers of one 4-bit input, and the layer that ends a gated one: outputs and all gradients."""
    layers = [layer(out, 128, seed=out) for out in (128, 256, 256)]
    x, gate, up = numbers(2, 20, 128), numbers(2, 20, 128), numbers(20, 2, 128).view(2, 20, 128)
    factors = [numbers(8, 128), numbers(128, 8), numbers(8, 128), numbers(256, 8), numbers(8, 128), numbers(256, 8)]
    factors = [factor * 0.1 for factor in factors]
    dropout = masks(dict.fromkeys("abc", (128, 128)), 40)

    def calls(used: list[Linear4bit], parameters: list[torch.Tensor]) -> Any:
        halves = [parameter.detach() for parameter in parameters]
        of = [dropout.mask(n, x) if dropping else None for n in range(len(used))]
        parts = zip(used, of, halves[::2], halves[1::2], strict=True)
        made = [products.Call(one, 2.0, mask, False, a, b) for one, mask, a, b in parts]
        return products.Shared(tuple(made), torch.cat(halves[::2]))

    def siblings(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return products.Adapted.apply(x, calls(layers, [*parameters]), None, *parameters)

    def gated_layer(gate: torch.Tensor, up: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return [products.Gated.apply(gate, up, ACTIVATIONS["silu"], calls(layers[:1], [*parameters]), *parameters)]

    for make, inputs in ((siblings, [x, *factors]), (gated_layer, [gate, up, *factors[:2]])):
        expected = results(make, inputs)
        with monkeypatch.context() as patch:
            used = []
            for module in (gated, low_rank):
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

    monkeypatch.setattr(gated, "kernels_for", lambda x, rows: kernels)
    gate = numbers(40, 96)
    assert gated._kernels_of(gate, gate) is kernels
    assert gated._kernels_of(gate, x) is None and gated._kernels_of(x, gate) is None
    monkeypatch.setattr(rotary, "kernels_for", lambda x, rows: kernels)
    heads, angles = numbers(2, 3, 5, 16), numbers(2, 1, 5, 16)
    assert rotary._kernels_for(heads, angles, angles) is kernels
    assert rotary._kernels_for(heads, angles, numbers(2, 1, 5, 32)[..., :16]) is None


def test_a_card_s_kernels_are_tried_before_they_are_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_check.agrees(kernels, DEVICE, HALF)
    for name in sorted(set(kernels.__all__) - {"unpack"}):  # that one is tried where weights are
        with monkeypatch.context() as patch:
            real = getattr(kernels, name)

            def wrong(*arguments: Any, real: Any = real) -> Any:
                result = real(*arguments)
                (arguments[2] if result is None else result[0] if isinstance(result, tuple) else result).mul_(1.1)
                return result

            patch.setattr(kernels, name, wrong)
            assert not kernel_check.agrees(kernels, DEVICE, HALF), name


@pytest.mark.parametrize("capability", ["75", "120", *(pytest.param(name, marks=SLOW) for name in ("86", "89", "90"))])
def test_the_kernels_compile_for_cards_old_and_new_and_fit(capability: str) -> None:
    """From Turing to Blackwell; Triton needs no card for it, and no interpreter."""
    without_interpreter("compile_kernels.py", capability)


@pytest.mark.parametrize("cases", [4, pytest.param(60, marks=SLOW)])
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
