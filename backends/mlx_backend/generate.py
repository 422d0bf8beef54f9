"""Completions in MLX: several prompts at once, without padding, so every kind of cache is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from backends.mlx_backend.head import Head
from backends.mlx_backend.prefix import keeps_keys_and_values
from backends.sampling import Draws, groups, shared_start

_DROPPED = 4  # rows are dropped once one in so many is finished: each time the cache is copied
_SPREAD = 16  # tokens by which their lengths may differ; each costs one short forward pass

Choice = Callable[[mx.array, Sequence[int]], list[int]]  # logits [N, vocab] and their rows -> a token for each


def generate(
    model: nn.Module,
    head: Head,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """As `Session.generate`. What is sampled for a prompt depends on `seed` and its place in `prompts` alone."""
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    completions: list[list[int]] = [[] for _ in prompts]
    if max_tokens < 1 or not prompts:
        return completions
    choose = _sampling(Draws(len(prompts), temperature, seed)) if temperature > 0 else _greedy
    start = _Start(model, head, prompts)
    for rows in groups([len(prompt) for prompt in prompts], _SPREAD):
        _complete(head, start, {row: prompts[row] for row in rows}, completions, max_tokens, stop, choose)
    return completions


class _Start:
    """What all prompts begin with, computed once."""

    def __init__(self, model: nn.Module, head: Head, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self.divisible = keeps_keys_and_values(model)  # whether rows can be taken from its caches
        self.length = shared_start(prompts) if self.divisible else 0
        self._cache = make_prompt_cache(model)
        if self.length:
            head.hidden(mx.array([list(prompts[0][: self.length])]), mx.array([0]), self._cache)
            mx.eval([cache.state for cache in self._cache])

    def cache(self, rows: int) -> list[Any]:
        return _taken(self._cache, [0] * rows) if self.length else make_prompt_cache(self._model)


def _taken(cache: Sequence[Any], rows: list[int]) -> list[Any]:
    """A copy with these rows of each block's keys and values."""
    copies = [copy(one) for one in cache]
    for one in copies:
        one.keys, one.values = one.keys[mx.array(rows)], one.values[mx.array(rows)]
    return copies


def _complete(
    head: Head,
    start: _Start,
    prompts: dict[int, Sequence[int]],
    completions: list[list[int]],
    max_tokens: int,
    stop: Collection[int],
    choose: Choice,
) -> None:
    """Fill `completions` at the rows of `prompts`, shortest first.

    All start with as many tokens as the shortest prompt has; the longer ones then go on with their own.
    """
    cache = start.cache(len(prompts))
    running = list(prompts)  # as they lie in the cache, the finished among them until they are dropped
    width = len(prompts[running[0]])
    tokens = np.array([prompts[row][start.length : width] for row in running], dtype=np.int32)  # [R, T]
    finished: set[int] = set()
    while len(finished) < len(running):
        ends = mx.arange(1, len(running) + 1) * tokens.shape[1] - 1
        logits = head.logits(head.hidden(mx.array(tokens), ends, cache))  # [R, vocab]
        tokens = np.array([[prompts[row][min(width, len(prompts[row]) - 1)]] for row in running], dtype=np.int32)
        places = [i for i, row in enumerate(running) if row not in finished and len(prompts[row]) <= width]
        chosen = choose(logits[mx.array(places)], [running[i] for i in places]) if places else []
        for place, token in zip(places, chosen, strict=True):
            row, tokens[place] = running[place], token
            if token not in stop:
                completions[row].append(token)
            if token in stop or len(completions[row]) == max_tokens:
                finished.add(row)
        if start.divisible and len(finished) * _DROPPED >= len(running) > len(finished):
            places = [i for i, row in enumerate(running) if row not in finished]
            running, tokens, cache = [running[i] for i in places], tokens[places], _taken(cache, places)
            finished.clear()
        width += 1


def _greedy(logits: mx.array, rows: Sequence[int]) -> list[int]:
    return [int(token) for token in np.array(mx.argmax(logits, axis=-1))]


def _sampling(draws: Draws) -> Choice:
    def choose(logits: mx.array, rows: Sequence[int]) -> list[int]:
        return draws.choose(np.array(logits), rows)

    return choose
