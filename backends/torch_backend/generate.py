"""Completions in torch: several prompts at once, and what they begin with in common once for all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from backends.sampling import Draws, groups, shared_start
from backends.torch_backend.forward import Forward

_SPREAD = 64  # tokens by which prompts that run together may differ in length

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
    spread = _SPREAD if forward.attends_to_all() else 0  # a window would count padding as tokens
    alone = ([row] for row in range(len(prompts)))  # where rows cannot enter or leave the cache
    for rows in groups([len(prompt) for prompt in prompts], spread) if together else alone:
        own = copy.deepcopy(cache)
        if start:
            own.batch_repeat_interleave(len(rows))
        _complete(forward, own, {row: prompts[row] for row in rows}, completions, max_tokens, stop, choose)
    return completions


def _complete(
    forward: Forward,
    cache: DynamicCache,
    prompts: Mapping[int, Sequence[int]],
    completions: list[list[int]],
    max_tokens: int,
    stop: Collection[int],
    choose: Choice,
) -> None:
    """Fill `completions` at the rows of `prompts`; the cache holds their first tokens. Rows leave when done.

    Prompts are padded on the right: what comes later is attended to by nothing before it, and hidden from what is new.
    """
    start, rows = cache.get_seq_length(), list(prompts)
    lengths = np.array([len(prompt) for prompt in prompts.values()])  # [R]
    tokens = np.zeros((len(rows), lengths.max() - start), np.int64)
    for own, prompt in zip(tokens, prompts.values(), strict=True):
        own[: len(prompt) - start] = prompt[start:]
    seen = np.arange(lengths.max()) < lengths[:, None]  # [R, T]
    logits = forward.last_logits(tokens, cache, lengths - start - 1)
    while True:
        chosen = choose(logits, rows)
        for row, token in zip(rows, chosen, strict=True):
            completions[row].extend([] if token in stop else [token])
        going = [
            token not in stop and len(completions[row]) < max_tokens for row, token in zip(rows, chosen, strict=True)
        ]
        if not any(going):
            return
        if not all(going):
            cache.batch_select_indices(torch.from_numpy(np.flatnonzero(going)))
        rows, lengths = [row for row, goes in zip(rows, going, strict=True) if goes], lengths[going] + 1
        seen = np.pad(seen[going], ((0, 0), (0, 1)), constant_values=True)
        logits = forward.next_logits(np.array(chosen)[going], cache, seen, lengths - 1)


def _greedy(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _sampling(draws: Draws) -> Choice:
    def choose(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        return draws.choose(logits.cpu().numpy(), rows)

    return choose
