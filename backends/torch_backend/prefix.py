"""Prefixes that rows share: their keys and values are computed once, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backends.interface import Batch, IntArray


def attends_to_all(model: Any) -> bool:
    """Whether every block keeps the keys and values of all earlier tokens, as transformers itself plans its cache."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class Start:
    """What the blocks keep of P prefixes, padded to L tokens: keys and values [P, G, L, d] of each block.

    Rows take them as leaves, so that many micro-batches can be run, one after the other, from one graph of the
    prefixes; `backward` then sends the gradients that have come together through that graph.
    """

    def __init__(self, body: Any, prefixes: Sequence[IntArray], device: torch.device) -> None:
        self._lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)  # [P]
        ids = np.zeros((len(prefixes), max(map(len, prefixes))), np.int64)
        for row, prefix in zip(ids, prefixes, strict=True):
            row[: len(prefix)] = prefix
        cache = DynamicCache(config=body.config)
        body(input_ids=torch.from_numpy(ids).to(device), past_key_values=cache, use_cache=True)
        self._made = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        self._leaves = [made.detach().requires_grad_(made.requires_grad) for made in self._made]

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """How the model's blocks are told to go on from the prefixes with the batch's rows."""
        of = torch.tensor(batch.prefix_of, device=self._lengths.device)  # [B]
        lengths, longest = self._lengths[of, None], self._leaves[0].shape[2]
        own = torch.arange(batch.inputs.shape[1], device=of.device)[None]  # [1, T]
        seen = torch.ones(len(of), longest + own.shape[1], dtype=torch.long, device=of.device)
        seen[:, :longest] = torch.arange(longest, device=of.device) < lengths
        pairs = zip(self._leaves[::2], self._leaves[1::2], strict=True)
        cache = Cache(layers=[_Layer(keys, values, of) for keys, values in pairs])
        return {"past_key_values": cache, "use_cache": True, "attention_mask": seen, "position_ids": lengths + own}

    def backward(self) -> None:
        """The gradient by the adapter of all that was computed from the leaves since."""
        pairs = [(made, leaf.grad) for made, leaf in zip(self._made, self._leaves, strict=True)]
        learnt = [(made, grad) for made, grad in pairs if grad is not None]
        if learnt:
            torch.autograd.backward([made for made, _ in learnt], [grad for _, grad in learnt])


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values of the prefixes, laid beside a row's own only while the block computes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, of: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._of = keys, values, of
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys.index_select(0, self._of), self.values.index_select(0, self._of)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
