"""The head a chunk at a time: the loss, gradient and scores of whole logits, for every form of head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backends.predictions import HEAD
from backends.torch_backend.head import Head, find_head
from tests.conformance.toy import Case
from tests.tiny_families import MODELS, published
from tests.tiny_models import FAMILIES, family

MANY = 2**23
FORMS = [
    (1.0, None, False),
    (1.0, None, True),
    (0.25, None, False),
    (3.0, None, True),
    (1.0, 2.0, False),
    (0.5, 3.0, True),
]


def drawn(
    bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 50, bias=bias, dtype=dtype).requires_grad_(False)
    states = torch.randn(23, 16, dtype=dtype) * 4
    return linear, states, torch.randint(0, 50, (23,)), torch.rand(23) / 23


def plain_logits(linear: torch.nn.Linear, states: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    logits = linear(states) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("numbers", [1, 7 * 50, 10**9])
@pytest.mark.parametrize(("scale", "cap", "bias"), FORMS)
def test_loss_gradient_and_scores_are_those_of_whole_logits(
    scale: float, cap: float | None, bias: bool, numbers: int
) -> None:
    linear, states, targets, shares = drawn(bias)
    leaf = states.clone().requires_grad_()
    logits = plain_logits(linear, leaf, scale, cap)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (shares * nll).sum()
    expected.backward()
    head = Head(linear, numbers, scale, cap)
    loss, gradient = head.loss(states, targets, shares)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-6, rtol=1e-4)
    logprob, greedy = head.score(states, targets)
    torch.testing.assert_close(logprob, -nll.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy, logits.argmax(-1))


def test_logits_of_an_unknown_head_are_taken_as_they_are() -> None:
    linear, states, targets, shares = drawn(False)
    loss, gradient = Head(None, MANY).loss(linear(states), targets, shares)
    wanted, grad_states = Head(linear, MANY).loss(states, targets, shares)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient @ linear.weight, grad_states)


def test_in_bfloat16_the_softmax_is_in_float32() -> None:
    linear, states, targets, shares = drawn(True, torch.bfloat16)
    loss, gradient = Head(linear, MANY).loss(states, targets, shares)
    nll = torch.nn.functional.cross_entropy(linear(states).float(), targets, reduction="none")
    torch.testing.assert_close(loss, (shares * nll).sum())
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, "cohere", "gemma2 without cap"])
def test_the_head_of_every_family_is_found(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    own = {"cohere": {"logit_scale": 0.3}, "gemma2 without cap": {"final_logit_softcapping": None}}.get(name, {})
    folder = family(name.split()[0], tmp_path, **own)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    head = find_head(model, MANY)
    assert head.linear is model.lm_head
    assert (head.cap is not None) == (name == "gemma2")
    assert head.scale == {"cohere": 0.3, "granite": 0.5}.get(name, 1.0)
    assert "forward" not in vars(model.base_model)


def test_a_head_that_does_more_is_left_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(family("gemma2", tmp_path)).eval()
    model.config.final_logit_softcapping, cap = None, model.config.final_logit_softcapping
    assert find_head(model, MANY).linear is model.lm_head
    own = type(model).forward

    def shifted(self: object, **given: object) -> object:
        out = own(self, **given)
        out.logits = cap * torch.tanh(out.logits / cap)
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    assert find_head(model, MANY).linear is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_with_a_row_that_is_not_finite_is_left_to_the_model(tmp_path: Path, value: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(family("llama", tmp_path)).eval()
    weight = model.lm_head.weight.detach().clone()
    weight[5] = value
    model.lm_head.weight = torch.nn.Parameter(weight)
    assert find_head(model, MANY).linear is None


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_models_as_their_makers_publish_them_is_found(name: str, tmp_path: Path) -> None:
    session = Case("torch", published(name, tmp_path)).open()
    assert HEAD in session.shortcuts, session.left_out
