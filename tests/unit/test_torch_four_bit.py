"""4-bit weights as numbers: what bitsandbytes gives itself, to the bit, whichever way it is asked."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
from bitsandbytes.cextension import lib  # noqa: E402
from bitsandbytes.functional import dequantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

from backends.torch_backend import four_bit  # noqa: E402
from backends.torch_backend.four_bit import base_product, dense  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(out: int = 96, inputs: int = 128, double: bool = True, seed: int = 0) -> Linear4bit:
    made = Linear4bit(inputs, out, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    return made.to(DEVICE)


@pytest.mark.parametrize("double", [True, False])
def test_the_numbers_are_bitsandbytes_own(double: bool) -> None:
    one = layer(double=double)
    expected = dequantize_4bit(one.weight.data, one.weight.quant_state)
    for dtype in (torch.bfloat16, torch.float32):
        found = dense(one, dtype)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_a_product_of_many_rows_is_that_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "_FEW", 4)
    one, x = layer(), torch.randn(16, 128, device=DEVICE).to(torch.bfloat16)
    torch.testing.assert_close(base_product(one, x), one(x), rtol=0.02, atol=0.1)  # kernels round bfloat16 otherwise
    assert torch.equal(base_product(one, x[:3]), one(x[:3]))  # few rows: the layer itself


def kernel(code: int, packed: int, scales: int, out: int, size: int, count: int, stream: int) -> None:
    """bitsandbytes' kernel of a CPU, with the arguments of a card's."""
    calls.append(count)
    pointers = [ctypes.c_void_p(address) for address in (code, packed, scales, out)]
    lib.cdequantize_blockwise_cpu_fp32(*pointers, ctypes.c_longlong(size), ctypes.c_longlong(count))


calls: list[int] = []


@pytest.mark.skipif(DEVICE != "cpu", reason="on a card its own kernel is asked, below")
def test_scales_of_a_block_are_unpacked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "can_join", lambda state: state.nested and state.absmax.numel() % 256 == 0)
    blocks = [torch.nn.ModuleList(layer(out, 128, seed=out + n) for out in (128, 256, 96, 384)) for n in (0, 1)]
    states = [[one.weight.quant_state for one in block] for block in blocks]
    alone = [[four_bit.scales_of(state, kernel, 0) for state in group] for group in states]
    weights = [[dense(one, torch.float32) for one in block] for block in blocks]
    for block in blocks:
        four_bit.join_scales(block)
    calls.clear()
    for group, expected in zip(states, alone, strict=True):
        for state, scales in [*zip(group, expected, strict=True)][::-1]:
            assert torch.equal(four_bit.scales_of(state, kernel, 0), scales)
    # one call for the weights of 128, 256 and 384 rows; that of 96 has scales that end within 256, and is left alone
    assert calls == [2 * 768, 2 * 96] * 2
    for block, expected in zip(blocks, weights, strict=True):  # bitsandbytes itself still reads them
        assert all(torch.equal(dense(one, torch.float32), weight) for one, weight in zip(block, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA card")
def test_on_a_card_a_block_s_weights_stay_what_they_are() -> None:
    block = torch.nn.ModuleList(layer(out, 128, seed=out) for out in (128, 256, 96, 384))
    before = [dense(one, torch.bfloat16) for one in block]
    four_bit.join_scales(block)
    assert sum(hasattr(one.weight.quant_state, "block") for one in block) == 3
    assert all(torch.equal(dense(one, torch.bfloat16), weight) for one, weight in zip(block, before, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA card")
def test_on_a_card_the_kernels_are_found() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert all(four_bit._unpacker(device, kind, torch.bfloat16) for kind in ("nf4", "fp4"))
    assert four_bit._unpacker(device, "no such kind", torch.bfloat16) is None


def test_a_plain_weight_is_itself() -> None:
    plain = torch.nn.Linear(4, 3)
    assert dense(plain, torch.float32) is plain.weight
