"""Hand-written gradients against those that autograd makes of the original modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from backends.interface import BackendError, LoraSpec
from backends.torch_backend import attention as torch_attention
from backends.torch_backend import layers as torch_layers
from backends.torch_backend import norms
from backends.torch_backend.costs import ROTARY
from backends.torch_backend.gated import ACTIVATIONS
from backends.torch_backend.layers import use_own_layers
from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.masks import Dropout
from backends.torch_backend.own_code import use_checked_own_code
from backends.torch_backend.rotary import rotated, use_own_rotary
from tests.conformance.toy import Case, toy_batch
from tests.tiny_families import MODELS, published
from tests.tiny_models import family

OWN_NORM = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "gemma2", "olmo2")
CPU = torch.device("cpu")
NO_DROPOUT = Dropout(0.0, 0, {}, CPU)
BFLOAT16 = {"atol": 3e-2, "rtol": 3e-2}


def opened(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(family(name, folder), dtype=dtype).eval().requires_grad_(False)


def by_inputs(module: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output and, from a fixed upstream gradient, the gradients by the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = module(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN_NORM)
def test_the_norm_is_the_models_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = opened(name, tmp_path, dtype)
    norm, x = model.model.layers[0].post_attention_layernorm, torch.randn(3, 5, 64).to(dtype) * 3
    norm.weight.data += torch.randn(64).to(dtype) / 4
    expected = by_inputs(norm, x)
    use_own_layers(model)
    assert norm.forward.func is norms._norm
    for ours, theirs in zip(by_inputs(norm, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **(BFLOAT16 if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gpt_oss_mxfp4"}))
def test_the_norms_of_makers_models_are_computed_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of widths, heads and mixtures' routers; left alone is what no other module is coded as."""
    model = auto_model(published(name, tmp_path)).to(dtype).requires_grad_(False)
    of = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    inputs = [torch.randn(3, 5, width_of(module)).to(dtype) * 3 for module in of]
    expected = [by_inputs(module, x) for module, x in zip(of, inputs, strict=True)]
    use_own_layers(model)
    assert of and all("forward" in vars(module) for module in of)
    for module, x, theirs in zip(of, inputs, expected, strict=True):
        out, grad = by_inputs(module, x)
        torch.testing.assert_close(out, theirs[0], atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)
        torch.testing.assert_close(grad, theirs[1], **(BFLOAT16 if dtype == torch.bfloat16 else {}))
        assert (out != theirs[0]).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)


def auto_model(folder: Path) -> Any:
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).get_decoder()
    except ValueError:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def width_of(norm: Any) -> int:
    return len(norm.weight) if hasattr(norm, "weight") else 16


def test_a_norm_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    model = opened("cohere", tmp_path)  # about its mean
    use_own_layers(model)
    assert not any("forward" in vars(module) for module in model.modules() if "Norm" in type(module).__name__)


def adapted(name: str, folder: Path, dropout: Dropout, dtype: torch.dtype) -> Any:
    model = opened(name, folder, dtype)
    mlp = model.model.layers[1].mlp
    torch.manual_seed(1)
    parts = ("gate_up_proj", "down_proj") if name == "phi3" else ("gate_proj", "up_proj", "down_proj")
    for number, part in enumerate(parts):
        layer = LoraLinear(getattr(mlp, part), LoraSpec(4, 8.0), dropout, number)
        torch.nn.init.normal_(layer.lora_A, std=0.1), torch.nn.init.normal_(layer.lora_B, std=0.1)
        setattr(mlp, part, layer)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "probability"), [("granite", 0.0), ("granite", 0.4), ("gemma2", 0.0), ("phi3", 0.0)])
def test_the_gated_layer_is_the_models_own(name: str, probability: float, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    dropout = Dropout(probability, 0, {part: (64, 64 if part != "down_proj" else 128) for part in parts}, CPU)
    dropout.at(3, np.arange(15))
    model = adapted(name, tmp_path, dropout, dtype)
    mlp, x = model.model.layers[1].mlp, torch.randn(3, 5, 64).to(dtype)
    results = []
    for change in (lambda: None, lambda: use_own_layers(model)):
        change()
        mlp.zero_grad()
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)])
    expected = torch_layers._gated_in_one if name == "phi3" else torch_layers._gated_layer
    assert mlp.forward.func is expected and len(results[0]) == (6 if name == "phi3" else 8)
    for ours, theirs in zip(*results, strict=True):
        limit = 0.03 * theirs.abs().max().item() if dtype == torch.bfloat16 else 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


def test_a_gated_layer_of_another_activation_stays_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family("llama", tmp_path, hidden_act="gelu"))
    use_own_layers(model)
    assert not any("forward" in vars(block.mlp) for block in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_rotary_positions_are_the_models_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Phi-3 turns a part of a head, in a function of its own, which is left as it is."""
    model = opened(name, tmp_path, dtype)
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 5, 64).to(dtype)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    results = []
    for change in (lambda: None, lambda: use_own_rotary(model)):
        change()
        results.append(by_inputs(lambda x: attention(x, position_embeddings=angles, attention_mask=None)[0], x))
    assert ("forward" in vars(attention)) == (name != "phi3")
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **(BFLOAT16 if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("name", ["llama", "nanochat"])
def test_a_model_that_turns_the_other_way_keeps_its_own_rotary(name: str, tmp_path: Path) -> None:
    """nanochat's `apply_rotary_pos_emb` is Llama's to the letter, and its `rotate_half` has the signs the other way."""
    plain, session = opened(name, tmp_path), Case("torch", tmp_path).open()
    batch = toy_batch()
    with torch.no_grad():
        logits = plain(input_ids=torch.from_numpy(batch.inputs).long()).logits.log_softmax(-1).numpy()
    expected = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0] * (batch.weights > 0)
    assert np.abs(session.score(batch).logprob - expected).max() < 1e-5
    assert (ROTARY in session.shortcuts) == (name == "llama")


def test_own_code_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = norms._norm
    monkeypatch.setattr(norms, "_norm", lambda module, gain, x: wrong(module, gain, x) * 1.01)
    model, ids = opened("llama", tmp_path), torch.tensor([[3, 1, 2]])
    expected = model(ids).logits
    assert use_checked_own_code(model) == []
    assert torch.equal(model(ids).logits, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_gradient_of_rotary_positions_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    angle = torch.randn(2, 3, 3, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda q, k: rotated(q, k, angle.cos(), angle.sin()), (q, k))
    for ours, theirs in zip(
        rotated(q, k, angle.cos(), angle.sin()), apply_rotary_pos_emb(q, k, angle.cos(), angle.sin()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs_learn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_lora_layer_is_its_formula(bias: bool, inputs_learn: bool) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 20, bias=bias).requires_grad_(False)
    layer = LoraLinear(base, LoraSpec(3, 6.0), NO_DROPOUT, 0)
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 7, 12, requires_grad=inputs_learn)
    leaves = [layer.lora_A, layer.lora_B] + [x] * inputs_learn
    expected = base(x) + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_gradient_of_the_lora_layer_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.3, 1, {"a": (6, 5)}, CPU)
    dropout.at(0, np.arange(4))
    layer = LoraLinear(torch.nn.Linear(5, 6).double().requires_grad_(False), LoraSpec(2, 3.0), dropout, 0).double()
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    x, gate, up = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora_A, layer.lora_B), atol=1e-3, rtol=1e-2)
    for activation in ACTIVATIONS.values():
        gated = partial(layer.gated, activation)
        assert torch.autograd.gradcheck(
            lambda g, u, *_, gated=gated: gated(g, u), (gate, up, layer.lora_A, layer.lora_B), atol=1e-3, rtol=1e-2
        )


def test_a_layer_that_is_run_on_other_rows_than_the_tokens_is_refused() -> None:
    dropout = Dropout(0.3, 1, {"experts.up": (6, 5)}, CPU)
    dropout.at(0, np.arange(4))
    layer = LoraLinear(torch.nn.Linear(5, 6).requires_grad_(False), LoraSpec(2, 3.0), dropout, 0)
    with pytest.raises(BackendError, match=r"experts\.up is run on 3 inputs for 4 tokens.*lora\.dropout: 0"):
        layer(torch.ones(3, 5))
    dropout.off()
    layer(torch.ones(3, 5))


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [2, 13, 40])
def test_attention_by_products_is_attention(
    length: int, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "_QUERIES", 16)
    monkeypatch.setattr(torch_attention, "_NUMBERS", 900)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, length, h, 8).transpose(1, 2) for h in (heads, groups, groups))

    def torchs(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    for ours, theirs in zip(
        by_inputs(lambda *qkv: torch_attention.attend(*qkv, 0.3), q, k, v), by_inputs(torchs, q, k, v), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_attention_by_products_obeys_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "_QUERIES", 4)
    monkeypatch.setattr(torch_attention, "_NUMBERS", 100)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 7, 8), torch.randn(3, 2, 12, 8), torch.randn(3, 2, 12, 8)
    allowed = (torch.rand(3, 1, 7, 12) < 0.5) | torch.eye(7, 12, dtype=torch.bool)
    mask = torch.zeros(3, 1, 7, 12).masked_fill_(~allowed, torch.finfo(torch.float32).min)

    def torchs(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True)

    ours = by_inputs(lambda *qkv: torch_attention.attend(*qkv, 0.3, mask), q, k, v)
    for own, wanted in zip(ours, by_inputs(torchs, q, k, v), strict=True):
        torch.testing.assert_close(own, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_model_in_bfloat16_uses_it_and_says_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = opened(name, tmp_path, torch.bfloat16), []
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[0] * 4 + [1] * 26, [1] * 30])
    expected = [model(input_ids=ids, attention_mask=mask).logits for mask in (None, padding)]
    attend = torch_attention.attend
    monkeypatch.setattr(torch_attention, "attend", lambda *given: calls.append(1) or attend(*given))
    torch_attention.use_tiles(model)
    ours = [model(input_ids=ids, attention_mask=mask).logits for mask in (None, padding)]
    assert len(calls) == 2 * model.config.num_hidden_layers
    for found, wanted in zip(ours, expected, strict=True):
        difference = (found - wanted)[padding == 1].abs().mean()
        assert difference < 0.02 * wanted.abs().mean()


def test_in_float32_torchs_own_attention_stays(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    torch_attention.use_tiles(model)
    assert model.config._attn_implementation == "sdpa"
