"""Which prompts run together, what they share, and what is drawn for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from backends.config_sizes import answering_bytes
from backends.interface import PROMPTS_TOGETHER
from backends.sampling import Completions, Draws, check_prompts, groups, room_for_answers, sample, shared_start

PROMPTS = some.lists(some.lists(some.integers(0, 3), min_size=1, max_size=9), min_size=2, max_size=6)


@given(PROMPTS, some.lists(some.integers(0, 3), max_size=8))
def test_the_shared_start_is_the_longest_that_leaves_each_prompt_a_token(
    prompts: list[list[int]], start: list[int]
) -> None:
    prompts = [[*start, *prompt] for prompt in prompts]
    length = shared_start(prompts)
    assert len({tuple(prompt[:length]) for prompt in prompts}) == 1 and all(len(prompt) > length for prompt in prompts)
    longer = {tuple(prompt[: length + 1]) for prompt in prompts}
    assert len(longer) > 1 or min(map(len, prompts)) == length + 1
    assert shared_start(prompts[:1]) == 0


@given(some.lists(some.integers(1, 100), max_size=60), some.integers(0, 40))
def test_groups_hold_every_row_once_and_alike(lengths: list[int], spread: int) -> None:
    found = list(groups(lengths, spread))
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    for group in found:
        own = [lengths[row] for row in group]
        assert own == sorted(own) and own[-1] - own[0] <= spread and len(group) <= PROMPTS_TOGETHER


@given(some.lists(some.integers(1, 100), min_size=1, max_size=60), some.integers(0, 40), some.integers(1, 2000))
def test_no_more_prompts_are_answered_together_than_fit(lengths: list[int], spread: int, room: int) -> None:
    found = list(groups(lengths, spread, room))
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    for group in found:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= room
    assert len(found) >= len(list(groups(lengths, spread)))


def test_keys_and_values_of_answers_are_counted() -> None:
    """An 8B Llama in 16 bits: 128 kB per token in its blocks, and 164 kB in one of them for a moment."""
    config = {
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
        "intermediate_size": 14336,
    }  # fmt: skip
    token = answering_bytes(config, 2)
    assert token == 2 * 32 * 2 * 1024 + 2 * (4 * 14336 + 6 * 4096)
    assert room_for_answers(None, token) == math.inf
    rows = [512 + 64] * 32
    for gigabytes, together in ((80, 32), (4, 11), (0, 1)):
        assert len(next(groups(rows, 0, room_for_answers(gigabytes * 10**9, token)))) == together
    assert answering_bytes({}, 2) > 0  # a config that says nothing


def test_samples_follow_the_distribution() -> None:
    draw, scores = np.random.default_rng(0), np.log([0.5, 0.3, 0.2])
    counts = np.bincount([sample(scores, draw) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_draws_depend_on_seed_and_row_alone() -> None:
    logits = np.zeros((1, 1000))
    drawn = [Draws(3, 1.0, seed).choose(logits, [row])[0] for seed, row in ((0, 0), (0, 0), (0, 2), (1, 0))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    cold = np.random.default_rng(0).normal(size=(2, 50))
    assert Draws(2, 1e-6, 0).choose(cold, [0, 1]) == cold.argmax(-1).tolist()


def completions(temperature: float, stop: tuple[int, ...] = (), max_tokens: int = 3) -> Completions:
    return Completions(2, max_tokens, stop, temperature, 0, lambda logits: logits.argmax(-1).tolist(), np.asarray)


def test_completions_end_at_a_stop_token_or_the_limit() -> None:
    first, second = np.eye(9)[[4, 5]], np.eye(9)[[7, 5]]
    written = completions(0, stop=(7,))
    assert written.add(first, [0, 1]) == ([4, 5], [True, True])
    assert written.add(second, [0, 1]) == ([7, 5], [False, True])
    assert written.add(second[1:], [1]) == ([5], [False])  # its third token
    assert written.tokens == [[4], [5, 5, 5]]


def test_at_a_temperature_tokens_are_drawn_per_row() -> None:
    logits = np.zeros((2, 1000))
    both, second = completions(1.0), completions(1.0)
    chosen, _ = both.add(logits, [0, 1])
    assert second.add(logits[1:], [1])[0] == chosen[1:]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(("prompts", "reason"), [([[1], []], "at least one"), ([[9]], "token 9"), ([[-1]], "token -1")])
def test_prompts_that_no_model_can_continue_are_refused(prompts: list[list[int]], reason: str) -> None:
    check_prompts([[0], [8]], 9)
    with pytest.raises(ValueError, match=reason):
        check_prompts(prompts, 9)
