"""Shared prefixes: keys and values computed once, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backends.interface import Batch, IntArray
from backends.micro_batches import padded_prefixes
from backends.torch_backend.device import uploaded
from backends.torch_backend.joined_attention import continuing


def attends_to_all(model: Any) -> bool:
    """Whether every block keeps the keys and values of all earlier tokens, as transformers itself plans its cache."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class SharedPrefixes:
    """Keys and values [P, G, L, d] of P prefixes, padded to L tokens, in each block.

    Rows take them as leaves of their own graph, so that many micro-batches can be run, one after the other, from one
    graph of the prefixes; `backward` then sends the sum of their gradients through that graph.
    """

    def __init__(self, body: Any, prefixes: Sequence[IntArray], device: torch.device, join: bool) -> None:
        """join: attention to a single prefix and to a row's own keys is computed apart (`joined_attention`)."""
        self._join = join and len(prefixes) == 1
        self._lengths = uploaded([np.array([len(prefix) for prefix in prefixes])], device)[0]  # [P]
        ids = padded_prefixes(prefixes).astype(np.int64)  # [P, L]
        cache = Cache(layers=[_Noted() for _ in DynamicCache(config=body.config).layers])
        body(input_ids=uploaded([ids], device)[0], past_key_values=cache, use_cache=True)
        self._computed = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        self._leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._computed]

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What to call the model's blocks with, so that the batch's rows continue the prefixes."""
        prefix_of = uploaded([np.array(batch.prefix_of)], self._lengths.device)[0]  # [B]
        lengths, longest = self._lengths[prefix_of, None], self._leaves[0].shape[2]
        columns = torch.arange(batch.inputs.shape[1], device=prefix_of.device)[None]  # [1, T]
        pairs = list(zip(self._leaves[::2], self._leaves[1::2], strict=True))
        places = {"use_cache": True, "position_ids": lengths + columns}
        if self._join:
            return {"past_key_values": Cache(layers=[_Marking(pair) for pair in pairs]), **places}
        visible = torch.ones(len(prefix_of), longest + columns.shape[1], dtype=torch.long, device=prefix_of.device)
        visible[:, :longest] = torch.arange(longest, device=prefix_of.device) < lengths
        cache = Cache(layers=[_Layer(keys, values, prefix_of) for keys, values in pairs])
        return {"past_key_values": cache, "attention_mask": visible, **places}

    def backward(self) -> None:
        """Adds the adapter's gradient from all that was computed with the leaves since."""
        pairs = [(tensor, leaf.grad) for tensor, leaf in zip(self._computed, self._leaves, strict=True)]
        needed = [(tensor, grad) for tensor, grad in pairs if grad is not None]
        if needed:
            torch.autograd.backward([tensor for tensor, _ in needed], [grad for _, grad in needed])


class _Noted(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values, noted when it is first run; the same comes of running it again."""

    is_initialized: bool

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        return key_states, value_states


class _Marking(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values of the only prefix, told to what attends to a row's own."""

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self._prefix = prefix

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return continuing(key_states, self._prefix), value_states


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values of the prefixes, put before a row's own only while the block computes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix_of: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._prefix_of = keys, values, prefix_of
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys.index_select(0, self._prefix_of), self.values.index_select(0, self._prefix_of)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
