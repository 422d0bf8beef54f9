"""The last block computed only where something is asked: elsewhere all that is needed of it are keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from backends.interface import FloatArray
from backends.torch_backend.patch import blocks_of

_SHARE = 2  # worth it where at most one position in so many is asked for


class _Recorded(Exception):
    """The block has its keys and values."""


class Tail:
    """Within `of(weights)` the model's last hidden states are those of the supervised positions alone.

    The block's attention is led to its cache twice: the first time, with all positions, it goes no further than
    handing over its keys and values; the second time, with the few positions, it is given those of all.
    """

    def __init__(self, model: Any) -> None:
        block = blocks_of(model)[0][-1]
        self._chosen: torch.Tensor | None = None  # [B, n]
        self._device = model.device
        block.forward = partial(self._forward, block.forward)

    @contextmanager
    def of(self, weights: FloatArray) -> Iterator[np.ndarray[Any, Any]]:
        """The flat places, in what the blocks then make, of the nonzero `weights` [B, T], in their order."""
        counts = np.count_nonzero(weights, axis=1)
        most, width = max(int(counts.max()), 1), weights.shape[1]
        if most * _SHARE > width:
            yield np.flatnonzero(weights)
            return
        asked = np.argsort(weights == 0, axis=1, kind="stable")[:, :most]  # a row with fewer has others beside them
        self._chosen = torch.from_numpy(asked).to(self._device)
        try:
            yield np.flatnonzero(np.arange(most) < counts[:, None])
        finally:
            self._chosen = None

    def _forward(self, own: Callable[..., Any], states: torch.Tensor, *rest: Any, **given: Any) -> Any:
        if self._chosen is None:
            return own(states, *rest, **given)
        past = _Past(given.get("past_key_values"))
        with suppress(_Recorded):
            own(states, *rest, **given | {"past_key_values": past})
        rows = torch.arange(len(states), device=states.device)[:, None]
        positions = given["position_embeddings"]
        few = {
            "past_key_values": past,
            "attention_mask": self._mask(given.get("attention_mask"), states.shape[1]),
            "position_embeddings": tuple(part.expand(len(states), -1, -1)[rows, self._chosen] for part in positions),
        }
        if given.get("position_ids") is not None:
            few["position_ids"] = given["position_ids"].expand(len(states), -1)[rows, self._chosen]
        return own(states[rows, self._chosen], *rest, **given | few)

    def _mask(self, mask: torch.Tensor | None, width: int) -> torch.Tensor:
        """Which of the S keys each of the few may look at. [B, 1, n, S]"""
        chosen: Any = self._chosen
        if mask is None:  # plainly causal
            return torch.arange(width, device=chosen.device) <= chosen[:, None, :, None]
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        few: torch.Tensor = mask.expand(len(chosen), -1, -1, -1)[:, 0][rows, chosen][:, None]
        return few


class _Past:
    """A cache for one block: it takes note of keys and values once, and gives them from then on."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *where: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pair is not None:
            return self._pair
        self._pair = (keys, values) if self._inner is None else self._inner.update(keys, values, *where, **named)
        raise _Recorded
