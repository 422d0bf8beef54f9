"""Completions in torch: several prompts at once, without padding, so every kind of cache is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from backends.sampling import Draws, groups, shared_start
from backends.torch_forward import Forward

Choice = Callable[[torch.Tensor, Sequence[int]], list[int]]  # logits [N, V] and their rows -> a token for each


def generate(
    forward: Forward,
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
    if not prompts or max_tokens < 1:
        return completions
    choose = _sampling(Draws(len(prompts), temperature, seed)) if temperature > 0 else _greedy
    cache = forward.empty_cache()
    together = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    start = shared_start(prompts) if together else 0
    if start:
        forward.last_logits(np.array([prompts[0][:start]]), cache)
    alone = ([row] for row in range(len(prompts)))  # where rows cannot enter or leave the cache
    for rows in groups([len(prompt) for prompt in prompts]) if together else alone:
        own = copy.deepcopy(cache)
        if start:
            own.batch_repeat_interleave(len(rows))
        running = _Running(forward, own, {row: prompts[row] for row in rows}, start)
        running.complete(completions, max_tokens, stop, choose)
    return completions


class _Running:
    """Prompts of similar length and their cache, shortest first; those that are done leave both.

    All go on together up to the shortest prompt's end; the longer ones then take their own tokens, one at a time,
    while the others already take what was chosen for them.
    """

    def __init__(self, forward: Forward, cache: DynamicCache, prompts: dict[int, Sequence[int]], start: int) -> None:
        self._forward, self._cache, self._prompts = forward, cache, prompts
        self._rows, self._width = list(prompts), len(next(iter(prompts.values())))
        self._tokens = np.array([prompt[start : self._width] for prompt in prompts.values()])  # [R, T]

    def complete(self, completions: list[list[int]], max_tokens: int, stop: Collection[int], choose: Choice) -> None:
        while self._rows:
            logits = self._forward.last_logits(self._tokens, self._cache)  # [R, V]
            ready = [place for place, row in enumerate(self._rows) if len(self._prompts[row]) <= self._width]
            chosen = choose(logits[ready], [self._rows[place] for place in ready]) if ready else []
            following, done = dict(zip(ready, chosen, strict=True)), set()
            for place, token in following.items():
                written = completions[self._rows[place]]
                if token not in stop:
                    written.append(token)
                if token in stop or len(written) == max_tokens:
                    done.add(place)
            self._advance(following, [place for place in range(len(self._rows)) if place not in done])

    def _advance(self, following: dict[int, int], kept: list[int]) -> None:
        """One token further with the rows at the places `kept`."""
        own = {place: self._prompts[row][self._width] for place, row in enumerate(self._rows) if place not in following}
        tokens = own | following
        if 0 < len(kept) < len(self._rows):
            self._cache.batch_select_indices(torch.tensor(kept))
        self._rows = [self._rows[place] for place in kept]
        self._tokens = np.array([[tokens[place]] for place in kept])
        self._width += 1


def _greedy(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _sampling(draws: Draws) -> Choice:
    def choose(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        return draws.choose(logits.cpu().numpy(), rows)

    return choose
