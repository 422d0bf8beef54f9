"""Shortcuts of the torch session: frozen blocks computed once, shared prefixes, prompts completed together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec
from backends.micro_batches import joined
from backends.torch_backend import forward as torch_forward
from backends.torch_backend import frozen as torch_frozen
from backends.torch_backend import joined_attention
from backends.torch_backend.session import TorchSession
from tests.conformance.toy import close, prefixed, random_adapter, toy_batch
from tests.tiny_models import FAMILIES, family, tiny_llama

TOP = LoraSpec(4, 8.0, layers=1)
BATCH, OTHER = toy_batch(), toy_batch(seed=1)
SHARING = {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite"}  # no sliding windows


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def opened(folder: Path, lora: LoraSpec = LoraSpec(4, 8.0), **spec: Any) -> Any:  # noqa: B008 (frozen)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"} | spec
    session = TorchSession(ModelSpec(folder, **settings), lora, OptimSpec(eps=1e-2), 0)
    session.set_state(random_adapter(session))
    return session


def counted(session: Any, block: int) -> list[int]:
    """How many positions that block computes, pass by pass, from here on."""
    seen: list[int] = []
    attention = session._model.model.layers[block].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["hidden_states"].shape[:2].numel()), with_kwargs=True
    )
    return seen


# --- frozen blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_frozen_blocks(name: str, dtype: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder = family(name, tmp_path)
    kept = opened(folder, TOP, dtype=dtype)
    assert kept._forward.frozen is not None
    monkeypatch.setattr(torch_forward.Forward, "keep_frozen_blocks", lambda self: False)
    fresh = opened(folder, TOP, dtype=dtype)
    near = {"rel": 1e-5} if dtype == "float32" else {"rel": 0.03}
    for _ in range(2):
        assert kept.step([BATCH], 1e-2).loss == pytest.approx(fresh.step([BATCH], 1e-2).loss, **near)
    if dtype == "float32":
        close(kept.get_state(), fresh.get_state(), 1e-4)
        np.testing.assert_allclose(kept.score(OTHER).logprob, fresh.score(OTHER).logprob, atol=1e-4)


def test_a_row_seen_again_costs_no_frozen_block(llama: Path) -> None:
    session = opened(llama, TOP)
    frozen, adapted = counted(session, 0), counted(session, 1)
    session.step([BATCH], 1e-2)
    lengths = [int(np.flatnonzero(weights)[-1]) + 1 for weights in BATCH.weights]
    assert sorted(frozen) == sorted(lengths)  # each row alone, up to its last supervised position
    session.step([BATCH], 1e-2), session.score(BATCH)
    assert len(frozen) == len(lengths) and len(adapted) == 3
    session.generate([[5, 6, 7]], 2, ())
    assert len(frozen) == len(lengths) + 2


def test_what_is_kept_does_not_depend_on_the_company(llama: Path) -> None:
    one, other = opened(llama, TOP), opened(llama, TOP)
    other.score(replace(BATCH, inputs=BATCH.inputs[::-1], targets=BATCH.targets[::-1], weights=BATCH.weights[::-1]))
    assert one.step([BATCH], 1e-2) == other.step([BATCH], 1e-2)
    for name, value in one.get_state().adapter.items():
        assert value.tobytes() == other.get_state().adapter[name].tobytes()


def test_frozen_blocks_that_cannot_be_left_out_are_computed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = opened(llama, TOP).step([BATCH], 1e-2)

    def broken(self: Any, tokens: Any) -> torch.Tensor:
        return torch.ones(len(tokens), 64)

    monkeypatch.setattr(torch_frozen.FrozenBlocks, "_computed", broken)
    session = opened(llama, TOP)
    assert session._forward.frozen is None
    assert session.step([BATCH], 1e-2).loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("other", [LoraSpec(8, 8.0, layers=1), LoraSpec(4, 8.0, targets=("q_proj",), layers=1)])
def test_what_is_kept_serves_a_session_with_another_adapter(llama: Path, other: LoraSpec) -> None:
    first, fresh, given = opened(llama, TOP), opened(llama, other), opened(llama, other)
    first.score(BATCH)
    given.take_kept_states(first.kept_states)
    frozen = counted(given, 0)
    assert given.step([BATCH], 1e-2) == fresh.step([BATCH], 1e-2) and not frozen
    for name, value in fresh.get_state().adapter.items():
        assert value.tobytes() == given.get_state().adapter[name].tobytes()


def test_what_other_blocks_kept_is_not_taken(llama: Path) -> None:
    whole, top, half = opened(llama), opened(llama, TOP), opened(llama, TOP, dtype="bfloat16")
    kept = top.kept_states
    for session in (whole, half):
        session.take_kept_states(kept)
        assert session.kept_states is not kept
    top.take_kept_states(whole.kept_states)
    top.take_kept_states(half.kept_states)
    assert whole.kept_states is None and top.kept_states is kept


def test_nothing_is_kept_where_nothing_is_frozen(llama: Path) -> None:
    assert opened(llama)._forward.frozen is None


# --- shared prefixes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shares_prefixes_exactly_or_not_at_all(name: str, dtype: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    shared, alone = opened(folder, dtype=dtype), opened(folder, dtype=dtype)
    assert shared.shares_prefixes == (name in SHARING)
    batch = prefixed()
    ours, theirs = shared.step([batch, OTHER, batch], 1e-2), alone.step([joined(batch), OTHER, joined(batch)], 1e-2)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5 if dtype == "float32" else 0.03)
    if dtype == "float32":
        close(shared.get_state(), alone.get_state(), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_attention_to_a_single_prefix_is_computed_apart(
    name: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask; the losses, the gradients and the scores are those of whole rows, and of the other way."""
    folder, batch = family(name, tmp_path), one_prefix()
    apart, other, alone = (opened(folder, checkpointing=checkpointing) for _ in range(3))
    assert apart.shares_prefixes and other.shares_prefixes and apart._forward._join
    other._forward._join = False
    whole = alone.score(joined(batch)).logprob[:, len(batch.prefixes[0]) :]
    np.testing.assert_allclose(apart.score(batch).logprob, whole, atol=1e-5)
    attended, real = [], joined_attention.attend
    monkeypatch.setattr(joined_attention, "attend", lambda *given: attended.append(given) or real(*given))
    results = [session.step([batch, OTHER, batch], 1e-2) for session in (apart, other)]
    assert len(attended) == (8 if checkpointing else 4)  # twice in each of two blocks, and once more
    results.append(alone.step([joined(batch), OTHER, joined(batch)], 1e-2))
    assert [result.loss for result in results] == [pytest.approx(results[0].loss, rel=1e-5)] * 3
    assert [result.grad_norm for result in results] == [pytest.approx(results[0].grad_norm, rel=1e-4)] * 3
    close(apart.get_state(), alone.get_state(), 1e-4)
    close(apart.get_state(), other.get_state(), 1e-4)


def one_prefix() -> Batch:
    batch = prefixed()
    return replace(batch, prefixes=batch.prefixes[:1], prefix_of=(0,) * len(batch.prefix_of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (3, 3, 8), (9, 3, 64)])
def test_joined_attention_is_attention_to_all_keys(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    assert joined_attention._works(torch.device("cpu"), dtype, heads, groups, width)


def test_joined_attention_is_tried_before_it_is_used(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a part's gradient is off, or the build has no such kernel, prefixes are shared in the other way."""
    for wrong in (lambda *given, real=joined_attention._flash_back: [2 * grad for grad in real(*given)], None):
        joined_attention._works.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(joined_attention, "_flash_back", wrong)
            session = opened(llama)
            assert session.shares_prefixes and not session._forward._join
    joined_attention._works.cache_clear()


def test_a_prefix_is_computed_once_for_micro_batches_that_follow_one_another(llama: Path) -> None:
    session, batch = opened(llama), prefixed()
    assert session.shares_prefixes
    seen = counted(session, 1)
    session.step([batch, batch], 1e-2)
    assert len(seen) == 3 and seen[0] == 2 * 11  # two prefixes, the longer of 11 tokens; then rows
    session.score(batch)
    assert len(seen) == 5


def test_prefixes_are_not_shared_where_that_is_not_exact(llama: Path) -> None:
    assert not opened(llama, TOP).shares_prefixes


def test_dropout_of_shared_prefixes_is_repeatable(llama: Path) -> None:
    lora = LoraSpec(4, 8.0, dropout=0.3)
    losses = [opened(llama, lora).step([prefixed()], 1e-2).loss for _ in range(2)]
    assert losses[0] == losses[1] != opened(llama).step([prefixed()], 1e-2).loss


# --- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_prompts_together_give_what_each_gives_alone(name: str, temperature: float, tmp_path: Path) -> None:
    window = {"sliding_window": 8} if name == "gemma3_text" else {}
    session, random = opened(family(name, tmp_path, **window)), np.random.default_rng(0)
    start = random.integers(3, 128, 12).tolist()
    lengths = (9, 1, 40, 3, 9, 17, 2, 30)
    for prompts in (
        [random.integers(3, 128, length).tolist() for length in lengths],
        [[*start, *random.integers(3, 128, length).tolist()] for length in lengths],
    ):
        together = session.generate(prompts, 7, [4, 5, 6], temperature, seed=1)
        for place, prompt in enumerate(prompts):
            filler = [prompt] * place  # what is sampled depends on the place
            assert session.generate([*filler, prompt], 7, [4, 5, 6], temperature, seed=1)[-1] == together[place]


def test_a_shared_start_is_computed_once_and_finished_rows_leave(llama: Path) -> None:
    session = opened(llama)
    seen = counted(session, 1)
    prompts = [[*range(3, 33), last] for last in (40, 41, 42)]
    whole = session.generate(prompts, 5, ())
    assert seen == [30, 3, 3, 3, 3, 3]
    seen.clear()
    stop = whole[0][1]
    short = session.generate(prompts, 5, [stop])
    assert short[0] == whole[0][:1] if stop != whole[0][0] else short[0] == []
    assert seen[:2] == [30, 3] and min(seen) < 3


def test_a_cache_whose_rows_cannot_change_takes_one_prompt_at_a_time(llama: Path, monkeypatch: Any) -> None:
    session = opened(llama)
    prompts = [[5, 6, 7], [5, 6, 9, 10], [8]]
    expected = session.generate(prompts, 4, ())
    monkeypatch.setattr("backends.torch_backend.generate.DynamicLayer", int)
    seen = counted(session, 1)
    assert session.generate(prompts, 4, ()) == expected
    assert [positions for positions in seen if positions > 1] == [3, 4]


def test_a_prompt_needs_a_token(llama: Path) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        opened(llama).generate([[]], 3, ())


def test_a_large_batch_is_computed_a_part_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = opened(llama), opened(llama)
    cut._tokens_at_once = 12
    seen = counted(cut, 1)
    ours, theirs = cut.step([BATCH], 1e-2), whole.step([BATCH], 1e-2)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and max(seen) <= 12 < BATCH.inputs.size
    close(cut.get_state(), whole.get_state())
    np.testing.assert_allclose(cut.score(BATCH).logprob, whole.score(BATCH).logprob, atol=1e-5)


def test_a_session_names_its_shortcuts(llama: Path, tmp_path: Path) -> None:
    always = ("head at supervised positions", "own LoRA gradient")
    always += ("own norms", "own gated layers", "own rotary positions")
    assert opened(llama).shortcuts == ("shared prefixes", *always)
    assert opened(llama, TOP).shortcuts == ("frozen blocks computed once", *always)
    assert opened(llama, checkpointing=True).shortcuts == ("shared prefixes", *always, "blocks computed again")
    assert opened(llama, dtype="bfloat16").shortcuts == ("shared prefixes", *always, "attention in tiles")
    assert opened(family("gemma2", tmp_path / "gemma2")).shortcuts == always
    cohere = opened(family("cohere", tmp_path / "cohere"))  # its norms are about the mean, its turns of pairs
    assert cohere.shortcuts == ("shared prefixes", *always[:2], "own gated layers")


def test_a_batch_without_supervision_has_no_scores(llama: Path) -> None:
    silent = Batch(BATCH.inputs, BATCH.targets, BATCH.weights * 0)
    assert not opened(llama).score(silent).logprob.any()
    batch = prefixed()
    session = opened(llama)
    empty = replace(batch, weights=batch.weights * 0)
    assert session.step([empty, BATCH], 0.0).loss == pytest.approx(opened(llama).step([BATCH], 0.0).loss, rel=1e-6)
