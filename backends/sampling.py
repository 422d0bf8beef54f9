"""Shared parts of generation: which prompts run together, and how the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.interface import PROMPTS_TOGETHER
from backends.micro_batches import check_range


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raises ValueError for an empty prompt, or a token that a model of `vocabulary` tokens does not have."""
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        check_range(np.array(prompt), vocabulary)


def groups(lengths: Sequence[int], spread: int, room: float = math.inf) -> Iterator[list[int]]:
    """Rows whose lengths differ by no more than `spread`, the shortest first.

    lengths: tokens of a prompt and its answer. room: those that fit in memory together; one row is a group in any case.
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        full = len(group) == PROMPTS_TOGETHER or (len(group) + 1) * lengths[row] > room
        if group and (full or lengths[row] > lengths[group[0]] + spread):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def room_for_answers(free: int | None, token: int) -> float:
    """Tokens, of `token` bytes each, that fit in half of the free memory: the rest is for what grows beside them."""
    return math.inf if free is None else free / 2 / token


def shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with in common, one less than the shortest has at most; 0 for one prompt."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in order, so the two that differ earliest
    return next((column for column in range(most) if first[column] != last[column]), most)


class Completions:
    """What is written after each prompt, token by token, up to a stop token or the limit.

    Logits [N, V] are the backend's own arrays: `greedy` gives the most probable token of each row, `to_numpy` a copy.
    """

    def __init__(
        self,
        prompts: int,
        max_tokens: int,
        stop: Collection[int],
        temperature: float,
        seed: int,
        greedy: Callable[[Any], list[int]],
        to_numpy: Callable[[Any], NDArray[Any]],
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self._max_tokens, self._stop = max_tokens, stop
        self._greedy, self._to_numpy = greedy, to_numpy
        self._draws = Draws(prompts, temperature, seed) if temperature > 0 else None

    def add(self, logits: Any, rows: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Chooses the next token of each of `rows` from its logits. Returns the tokens, and which rows go on."""
        chosen = self._greedy(logits) if self._draws is None else self._draws.choose(self._to_numpy(logits), rows)
        for row, token in zip(rows, chosen, strict=True):
            self.tokens[row].extend([] if token in self._stop else [token])
        return chosen, [
            token not in self._stop and len(self.tokens[row]) < self._max_tokens
            for row, token in zip(rows, chosen, strict=True)
        ]


class Draws:
    """Tokens at a temperature. What is drawn for a prompt depends only on the seed and the prompt's row number."""

    def __init__(self, prompts: int, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generators = [np.random.default_rng((seed, row)) for row in range(prompts)]

    def choose(self, logits: NDArray[Any], rows: Sequence[int]) -> list[int]:
        """A token for each of `rows` from its `logits` [N, V]."""
        scores = logits.astype(np.float64) / self._temperature
        return [sample(row_scores, self._generators[row]) for row_scores, row in zip(scores, rows, strict=True)]


def sample(scores: NDArray[np.float64], draw: np.random.Generator) -> int:
    """A token from the softmax of `scores` [vocab], by inversion of its distribution function."""
    cumulative = np.cumsum(np.exp(scores - np.max(scores)))
    return min(int(np.searchsorted(cumulative, draw.random() * cumulative[-1], side="right")), len(scores) - 1)
