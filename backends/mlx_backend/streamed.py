"""A model whose frozen blocks are read from the disk each time they compute (`ModelSpec.streamed`), in MLX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from backends.interface import BackendError, ModelSpec, Modules
from backends.memory_plan import first_adapted
from backends.mlx_backend.model import finished, load, outside_blocks, read, scheme_of, unread
from backends.mlx_backend.patch import subclassed
from backends.streaming import cannot_stream


def opened(spec: ModelSpec, dtype: mx.Dtype, adapted: Modules) -> tuple[nn.Module, str, Streamed | None]:
    """The frozen model, whole or streamed, its 4-bit scheme, and what streams it. Raises BackendError."""
    frozen = first_adapted(adapted) if spec.streamed else 0
    if not frozen:
        return *load(spec, dtype), None
    streamed = Streamed(spec, dtype, frozen)
    return streamed.model, streamed.scheme, streamed


class Streamed:
    """The model without its first blocks; each of those is there while it is `held`, or while it computes.

    Parts are numbered: 0 is the embedding, where the output layer is another one, and b + 1 is block b. Each is a part
    of a model that is loaded as one that is held whole, and whose other tensors are never read.
    """

    def __init__(self, spec: ModelSpec, dtype: mx.Dtype, count: int) -> None:
        """count: of the frozen blocks. Raises BackendError where the model cannot be held in part."""
        self._spec, self._dtype, self.count = spec, dtype, count
        if spec.remote_code:
            raise self.refusal("it comes with code of its own")
        self.own_code: list[Callable[[nn.Module], object]] = []  # what replaces code of a loaded model's modules
        self.unread = False  # True: nobody needs what the embedding gives
        model = unread(spec, dtype)
        self.scheme = scheme_of(spec, model)
        outside = outside_blocks(model)
        apart = any(isinstance(module, nn.Linear | nn.QuantizedLinear) for module in outside)
        embeddings = [module for module in outside if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
        self._embedding = embeddings[0] if apart and len(embeddings) == 1 else None
        for module in outside:
            if module is not self._embedding:
                read(module)
        for block in model.layers[count:]:
            read(block)
        for number, block in enumerate(model.layers[:count]):
            dict.clear(block)
            subclassed(block, partial(self._run, number + 1))
        if self._embedding is not None:
            dict.clear(self._embedding)
            subclassed(self._embedding, self._embed)
        self.model = finished(spec, model)

    def refusal(self, why: str) -> BackendError:
        return BackendError(cannot_stream(self._spec.path, why))

    @contextmanager
    def held(self, part: int) -> Iterator[None]:
        """In here the part is in memory. What it gives must be computed before the end."""
        module = self.model.layers[part - 1] if part else self._embedding
        if module is None or dict.keys(module):
            yield
            return
        dict.update(module, self._loaded(part))
        try:
            yield
        finally:
            dict.clear(module)
            mx.clear_cache()

    def holding(self, layer: str) -> AbstractContextManager[None]:
        """In here a layer, by its name in the model or the checkpoint, is in memory."""
        match = re.search(r"\blayers\.(\d+)\.", layer)
        return self.held(int(match[1]) + 1) if match and int(match[1]) < self.count else nullcontext()

    def _loaded(self, part: int) -> nn.Module:
        """The part, from a model that computes as the whole one does."""
        model = unread(self._spec, self._dtype)
        outside = [one for one in outside_blocks(model) if isinstance(one, nn.Embedding | nn.QuantizedEmbedding)]
        wanted: nn.Module = model.layers[part - 1] if part else outside[0]
        read(wanted)
        for number, block in enumerate(model.layers):
            if number != part - 1:
                dict.clear(block)
        for module in outside_blocks(model):
            if module is not wanted:
                dict.clear(module)
        for change in self.own_code:
            change(model)
        return finished(self._spec, model).layers[part - 1] if part else wanted

    def _run(self, part: int, base: Callable[..., Any], block: nn.Module, *args: Any, **named: Any) -> Any:
        with self.held(part):
            made = base(block, *args, **named)
            mx.eval([array for _, array in tree_flatten(made)])
        return made

    def _embed(self, base: Callable[..., Any], embedding: nn.Module, ids: mx.array) -> Any:
        if self.unread:
            return mx.zeros((*ids.shape, 1), self._dtype)
        with self.held(0):
            made = base(embedding, ids)
            mx.eval(made)
        return made
