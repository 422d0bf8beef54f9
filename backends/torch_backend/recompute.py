"""Blocks computed again in the backward pass: of each, only what enters it is kept (Chen et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from backends.torch_backend.lora import Dropout, LoraLinear
from backends.torch_backend.patch import blocks_of, is_coded_as


def recompute_blocks(model: Any, masks: Dropout) -> None:
    """From here on the adapted blocks keep nothing but their input. No byte of a result changes.

    transformers' own way would switch caches off, and with them shared prefixes and frozen blocks computed once.
    """
    blocks, first = blocks_of(model)
    for block in list(blocks)[first:]:
        block.forward = partial(_forward, block.forward, _last_layer(block), masks)


def _forward(forward: Callable[..., Any], last: LoraLinear | None, masks: Dropout, *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    keys = masks.keys
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # dropout's masks are counted, and not drawn
        determinism_check="none",
        context_fn=lambda: (nullcontext(), _again(masks, keys, last)),
        **named,
    )


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
