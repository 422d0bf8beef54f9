"""Completions in MLX: several prompts at once, without padding, so every kind of cache is right."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from backends.mlx_backend.head import Head
from backends.mlx_backend.prefix import keeps_keys_and_values
from backends.sampling import Completions, groups, shared_start

_DROPPED = 4  # rows are dropped once one in so many is complete: each time the cache is copied
_SPREAD = 16  # tokens by which prompts that run together may differ in length; each costs one short forward pass


def generate(
    model: nn.Module,
    head: Head,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
    temperature: float,
    seed: int,
    room: float = math.inf,
) -> list[list[int]]:
    """As `Session.generate`. room: tokens that fit in memory together."""
    completions = Completions(len(prompts), max_tokens, stop, temperature, seed, _greedy, np.array)
    if not prompts or max_tokens < 1:
        return completions.tokens
    start = _SharedStart(model, head, prompts)
    for rows in groups([len(prompt) + max_tokens for prompt in prompts], _SPREAD, room):
        _complete(head, start, {row: prompts[row] for row in rows}, completions)
    return completions.tokens


class _SharedStart:
    """What all prompts begin with, computed once."""

    def __init__(self, model: nn.Module, head: Head, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self.divisible = keeps_keys_and_values(model)  # whether rows can be taken from its caches
        self.length = shared_start(prompts) if self.divisible else 0
        self._cache = make_prompt_cache(model)
        if self.length:
            head.states(mx.array([list(prompts[0][: self.length])]), self._cache)
            mx.eval([cache.state for cache in self._cache])

    def cache(self, rows: int) -> list[Any]:
        return _rows_of(self._cache, [0] * rows) if self.length else make_prompt_cache(self._model)


def _rows_of(cache: Sequence[Any], rows: list[int]) -> list[Any]:
    """A copy with these rows of each block's keys and values."""
    copies = [copy(block) for block in cache]
    for block in copies:
        block.keys, block.values = block.keys[mx.array(rows)], block.values[mx.array(rows)]
    return copies


def _complete(head: Head, start: _SharedStart, prompts: Mapping[int, Sequence[int]], completions: Completions) -> None:
    """Completes the rows of `prompts`, the shortest first.

    All start with as many tokens as the shortest prompt has; the longer ones then continue with their own.
    """
    cache = start.cache(len(prompts))
    running = list(prompts)  # as they lie in the cache, the complete ones among them until they are dropped
    width = len(prompts[running[0]])
    tokens = np.array([prompts[row][start.length : width] for row in running], dtype=np.int32)  # [R, T]
    complete: set[int] = set()
    while len(complete) < len(running):
        ends = mx.arange(1, len(running) + 1) * tokens.shape[1] - 1
        logits = head.logits(head.hidden(mx.array(tokens), ends, cache))  # [R, vocab]
        tokens = np.array([[prompts[row][min(width, len(prompts[row]) - 1)]] for row in running], dtype=np.int32)
        answering = [i for i, row in enumerate(running) if row not in complete and len(prompts[row]) <= width]
        if answering:
            chosen, going = completions.add(logits[mx.array(answering)], [running[i] for i in answering])
            tokens[answering, 0] = chosen
            complete |= {running[i] for i, goes in zip(answering, going, strict=True) if not goes}
        if start.divisible and len(complete) * _DROPPED >= len(running) > len(complete):
            remaining = [i for i, row in enumerate(running) if row not in complete]
            running, tokens, cache = [running[i] for i in remaining], tokens[remaining], _rows_of(cache, remaining)
            complete.clear()
        width += 1


def _greedy(logits: mx.array) -> list[int]:
    return [int(token) for token in np.array(mx.argmax(logits, axis=-1))]
