"""Attention for cards whose kernel knows no shared key heads: the same, with keys and values repeated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from backends.torch_backend import attention  # noqa: E402
from backends.torch_backend.model import load_frozen  # noqa: E402
from tests.tiny_models import family  # noqa: E402


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch's kernel is asked for."""
    calls: list[dict[str, Any]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Any, key: Any, value: Any, **named: Any) -> Any:
        calls.append({"heads": (query.shape[1], key.shape[1], value.shape[1]), "type": query.dtype, **named})
        return own(query, key, value, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return calls


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_old_card_is_given_keys_for_every_head(
    name: str, padded: bool, tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.interface import ModelSpec

    model = load_frozen(ModelSpec(family(name, tmp_path)), torch.device("cpu"))
    ids = torch.arange(3, 21).reshape(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    arguments = {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if padded else {})
    expected = model(**arguments).logits
    asked.clear()
    monkeypatch.setattr(attention, "half_type", lambda device: "float16")
    assert attention.expand_heads(model)
    found = model(**arguments).logits
    torch.testing.assert_close(found[mask > 0], expected[mask > 0])
    assert len(asked) == 2
    for call in asked:
        assert call["heads"] == (4, 4, 4) and not call.get("enable_gqa")
        assert padded or (call["is_causal"] and call["attn_mask"] is None)


@pytest.mark.parametrize(("half", "kind"), [("bfloat16", "sdpa"), ("float16", "eager")])
def test_other_cards_and_other_attention_stay(half: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "half_type", lambda device: half)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=kind), device=torch.device("cpu"))
    assert not attention.expand_heads(model)


def test_bfloat16_on_an_old_card_attends_in_float32(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel takes no bfloat16 there, and would make all weights [T, T]."""
    from backends.interface import ModelSpec

    folder = family("gemma3_text", tmp_path)
    model = load_frozen(ModelSpec(folder, dtype="bfloat16"), torch.device("cpu"))
    monkeypatch.setattr(attention, "half_type", lambda device: "float16")
    expected = model(torch.arange(3, 21)[None], use_cache=False).logits
    asked.clear()
    assert attention.expand_heads(model)
    found = model(torch.arange(3, 21)[None], use_cache=False).logits
    assert found.dtype == torch.bfloat16 and {call["type"] for call in asked} == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
