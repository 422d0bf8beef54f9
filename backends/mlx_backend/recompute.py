"""Blocks computed again in the backward pass: of each, only what enters it is kept (Chen et al., 2016)."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from backends.mlx_backend.lora import Dropout
from backends.mlx_backend.patch import subclassed
from backends.mlx_backend.prefix import PrefixCache, Recorder


def recompute_blocks(model: nn.Module, masks: Dropout) -> None:
    """Of this model only; other models keep their classes.

    To be computed again a block has to be a function of its arguments alone: the keys and values of a prefix are
    given to it and taken from it as such, and dropout is that of the tokens which it was run on.
    """

    def call(base: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return base(block, *args, **kwargs)
        caches = (one for one in (*args, *kwargs.values()) if isinstance(one, PrefixCache | Recorder))
        cache, keys = next(caches, None), masks.keys
        given: Any = cache.pair if isinstance(cache, PrefixCache) else ()

        def run(pair: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            with masks.as_of(keys):
                if isinstance(cache, PrefixCache):
                    cache.pair = pair
                out = base(block, *args, **kwargs)
                return out, cache.pair if isinstance(cache, Recorder) else ()

        out, recorded = nn.utils.checkpoint(block, run)(given, *args, **kwargs)
        if cache is not None:
            cache.pair = recorded if isinstance(cache, Recorder) else given
        return out

    for block in model.layers:
        subclassed(block, call)
