"""Completions in MLX: several prompts at once, without padding, so every kind of cache is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from backends.mlx_model import Head

_ROWS = 16  # prompts run together
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
    if max_tokens < 1:
        return completions
    choose = _sampling(len(prompts), temperature, seed) if temperature > 0 else _greedy
    for rows in _groups([len(prompt) for prompt in prompts]):
        _complete(model, head, {row: prompts[row] for row in rows}, completions, max_tokens, stop, choose)
    return completions


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of similar length, the shortest first."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if group and (len(group) == _ROWS or lengths[row] > lengths[group[0]] + _SPREAD):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _complete(
    model: nn.Module,
    head: Head,
    prompts: dict[int, Sequence[int]],
    completions: list[list[int]],
    max_tokens: int,
    stop: Collection[int],
    choose: Choice,
) -> None:
    """Fill `completions` at the rows of `prompts`, shortest first.

    All start with as many tokens as the shortest prompt has; the longer ones then go on with their own.
    """
    cache = make_prompt_cache(model)
    places = {row: place for place, row in enumerate(prompts)}
    running = set(prompts)
    width = len(next(iter(prompts.values())))
    tokens = np.array([prompt[:width] for prompt in prompts.values()], dtype=np.int32)  # [R, T]
    while running:
        ends = mx.arange(1, len(places) + 1) * tokens.shape[1] - 1
        logits = head.logits(mx.array(tokens), ends, cache)  # [R, vocab]
        tokens = np.array([[prompt[min(width, len(prompt) - 1)]] for prompt in prompts.values()], dtype=np.int32)
        rows = [row for row in prompts if row in running and len(prompts[row]) <= width]
        chosen = choose(logits[mx.array([places[row] for row in rows])], rows) if rows else []
        for row, token in zip(rows, chosen, strict=True):
            tokens[places[row]] = token
            if token not in stop:
                completions[row].append(token)
            if token in stop or len(completions[row]) == max_tokens:
                running.discard(row)
        width += 1


def _greedy(logits: mx.array, rows: Sequence[int]) -> list[int]:
    return [int(token) for token in np.array(mx.argmax(logits, axis=-1))]


def _sampling(prompts: int, temperature: float, seed: int) -> Choice:
    draws = [np.random.default_rng((seed, row)) for row in range(prompts)]

    def choose(logits: mx.array, rows: Sequence[int]) -> list[int]:
        scores = np.array(logits).astype(np.float64) / temperature
        return [_sample(own, draws[row]) for own, row in zip(scores, rows, strict=True)]

    return choose


def _sample(scores: NDArray[np.float64], draw: np.random.Generator) -> int:
    """A token from the softmax of `scores` [vocab], by inversion of its distribution function."""
    cumulative = np.cumsum(np.exp(scores - scores.max()))
    return min(int(np.searchsorted(cumulative, draw.random() * cumulative[-1], side="right")), len(scores) - 1)
