"""Generation in torch: several prompts at once, their common prefix computed once."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from backends.sampling import Completions, groups, shared_start
from backends.torch_backend.forward import Forward

_SPREAD = 64  # tokens by which prompts that run together may differ in length


def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
    temperature: float,
    seed: int,
    room: float = math.inf,
) -> list[list[int]]:
    """As `Session.generate`. room: tokens that fit in memory together."""
    completions = Completions(len(prompts), max_tokens, stop, temperature, seed, _greedy, _to_numpy)
    if not prompts or max_tokens < 1:
        return completions.tokens
    cache = forward.empty_cache()
    together = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    start = shared_start(prompts) if together else 0
    if start:
        forward.last_logits(np.array([prompts[0][:start]]), cache)
    spread = _SPREAD if forward.attends_to_all() else 0  # a window would count padding as tokens
    alone = ([row] for row in range(len(prompts)))  # where rows cannot enter or leave the cache
    lengths = [len(prompt) + max_tokens for prompt in prompts]
    for rows in groups(lengths, spread, room) if together else alone:
        group_cache = copy.deepcopy(cache)
        if start:
            group_cache.batch_repeat_interleave(len(rows))
        _complete(forward, group_cache, {row: prompts[row] for row in rows}, completions)
    return completions.tokens


def _complete(
    forward: Forward, cache: DynamicCache, prompts: Mapping[int, Sequence[int]], completions: Completions
) -> None:
    """Completes the rows of `prompts`, whose first tokens are in the cache. Rows leave it when they are complete.

    Prompts are padded on the right: nothing attends to what comes later, and padding is hidden from new tokens.
    """
    start, rows = cache.get_seq_length(), list(prompts)
    lengths = np.array([len(prompt) for prompt in prompts.values()])  # [R]
    tokens = np.zeros((len(rows), lengths.max() - start), np.int64)
    for row, prompt in zip(tokens, prompts.values(), strict=True):
        row[: len(prompt) - start] = prompt[start:]
    visible = np.arange(lengths.max()) < lengths[:, None]  # [R, T]
    logits = forward.last_logits(tokens, cache, lengths - start - 1)
    while True:
        chosen, going = completions.add(logits, rows)
        if not any(going):
            return
        if not all(going):
            cache.batch_select_indices(torch.from_numpy(np.flatnonzero(going)))
        rows, lengths = [row for row, goes in zip(rows, going, strict=True) if goes], lengths[going] + 1
        visible = np.pad(visible[going], ((0, 0), (0, 1)), constant_values=True)
        logits = forward.next_logits(np.array(chosen)[going], cache, visible, lengths - 1)


def _greedy(logits: torch.Tensor) -> list[int]:
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _to_numpy(logits: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = logits.cpu().numpy()
    return array
