"""Blocks computed again in the backward pass: of each, only what enters it is kept (Chen et al., 2016).

torch's own checkpoints do the same and cost a GPU's host as much as the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from backends.torch_backend.lora import LoraLinear
from backends.torch_backend.masks import Dropout
from backends.torch_backend.offload import Parking
from backends.torch_backend.patch import blocks_of, is_coded_as


def recompute_blocks(model: Any, masks: Dropout, device: torch.device) -> None:
    """From here on the adapted blocks keep nothing but their input, and that beside the card. No byte of a result
    changes.

    transformers' own way would switch caches off, and with them shared prefixes and frozen blocks computed once.
    """
    blocks, first = blocks_of(model)
    parking = Parking(device)
    for block in list(blocks)[first:]:
        block.forward = partial(_forward, block.forward, _last_layer(block), masks, parking)


def _forward(
    forward: Callable[..., Any],
    last: LoraLinear | None,
    masks: Dropout,
    parking: Parking,
    states: torch.Tensor,
    *args: Any,
    **named: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(states, *args, **named)
    keys, kept = masks.keys, parking.put(states)

    def run() -> None:
        with _again(masks, keys, last):
            forward(kept(), *args, **named)

    block = _Forgotten(run)
    with saved_tensors_hooks(block.count, block.take):
        return forward(states, *args, **named)


class _Forgotten:
    """The tensors that autograd would keep of one block: counted, and all made again when the first is needed.

    Each is let go as it is taken; should one be needed twice, the block is computed once more.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run, self._saved = run, 0
        self._made: list[torch.Tensor | None] | None = None

    def count(self, tensor: torch.Tensor) -> int:
        self._saved += 1
        return self._saved - 1

    def take(self, number: int) -> torch.Tensor:
        if (made := self._made) is None or (tensor := made[number]) is None:
            made = self._made = self._made_again()
            tensor = made[number]
        made[number] = None
        assert tensor is not None
        return tensor

    def _made_again(self) -> list[torch.Tensor | None]:
        made: list[torch.Tensor | None] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: made.append(tensor.detach()), _not_needed):
            self._run()
        assert len(made) == self._saved, "a block saves other tensors when it is computed again"
        return made


def _not_needed(_: None) -> torch.Tensor:
    raise AssertionError("nobody runs backward through a block that is computed again")


@contextmanager
def _again(masks: Dropout, keys: torch.Tensor | None, last: LoraLinear | None) -> Iterator[None]:
    """In here a block is computed for its gradient alone: the product that ends it, a quarter of all, is left out."""
    with masks.as_of(keys):
        if last:
            last.unused = True
        try:
            yield
        finally:
            if last:
                last.unused = False


def _last_layer(block: Any) -> LoraLinear | None:
    """The layer whose output is only added to the block's output, where the block is known to be so."""
    mlp: Any = getattr(block, "mlp", None)
    known = is_coded_as(block, LlamaDecoderLayer) and is_coded_as(mlp, LlamaMLP)
    return mlp.down_proj if known and isinstance(mlp.down_proj, LoraLinear) else None
