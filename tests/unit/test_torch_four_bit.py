"""4-bit weights as numbers: what bitsandbytes gives itself, to the bit, whichever way it is asked."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

from backends.torch_backend import four_bit  # noqa: E402
from backends.torch_backend.four_bit import base_products, dense  # noqa: E402

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
    torch.testing.assert_close(
        base_products([one], x)[0], one(x), rtol=0.02, atol=0.1
    )  # kernels round bfloat16 otherwise
    assert torch.equal(base_products([one], x[:3])[0], one(x[:3]))  # few rows: the layer itself


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA card")
def test_on_a_card_the_kernels_are_found() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert all(four_bit._unpacker(device, kind, torch.bfloat16) for kind in ("nf4", "fp4"))
    assert four_bit._unpacker(device, "no such kind", torch.bfloat16) is None


def test_a_plain_weight_is_itself() -> None:
    plain = torch.nn.Linear(4, 3)
    assert dense(plain, torch.float32) is plain.weight
