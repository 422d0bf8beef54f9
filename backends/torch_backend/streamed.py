"""A model whose frozen blocks are read from the disk each time they compute (`ModelSpec.streamed`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from backends.interface import BackendError, ModelSpec, Modules
from backends.memory_plan import first_adapted
from backends.model_folder import folder_of
from backends.streaming import cannot_stream
from backends.torch_backend.model import load_frozen
from backends.torch_backend.own_code import use_own_code
from backends.torch_backend.tree import config_of


def opened(spec: ModelSpec, device: torch.device, adapted: Modules) -> tuple[Any, Streamed | None]:
    """The frozen model, whole or streamed, and what streams it. Raises BackendError."""
    frozen = first_adapted(adapted) if spec.streamed else 0
    streamed = Streamed(spec, device, frozen) if frozen else None
    return streamed.model if streamed else load_frozen(spec, device), streamed


class Hollow(torch.nn.Module):  # type: ignore[misc]
    """Stands where a module of the model is not held."""

    def __init__(self, num_embeddings: int = 0) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings


class Streamed:
    """The model without its first blocks; each of those is there while it is `held`, or while it computes.

    Parts are numbered: 0 is the embedding, where the output layer is another one, and b + 1 is block b. Each is read by
    the library's own loader, so that its weights are cast and quantised as in a model that is held whole.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, count: int) -> None:
        """count: of the frozen blocks. Raises BackendError where the model cannot be held in part."""
        self._spec, self._device, self.count = spec, device, count
        self._embedding: Any = None  # None: it is the output layer too, and is always there
        self._check()
        self.model = load_frozen(spec, device, self._without_frozen)
        self.blocks: list[Any] = list(self.model.get_decoder().layers)[:count]
        for number, block in enumerate(self.blocks):
            block.forward = partial(self._run, number)
        embedding = self.model.get_input_embeddings()
        self._embeds_apart = isinstance(embedding, Hollow)
        if self._embeds_apart:
            embedding.forward = self._embed
            none = torch.empty(0, dtype=self.model.dtype, device=device)  # a model's type is that of its first weight
            embedding.weight = torch.nn.Parameter(none, requires_grad=False)

    def refusal(self, why: str) -> BackendError:
        return BackendError(cannot_stream(self._spec.path, why))

    @contextmanager
    def held(self, part: int) -> Iterator[None]:
        """In here the part is in memory."""
        if part == 0 and (self._embedding is not None or not self._embeds_apart):
            yield
        elif part == 0:
            self._embedding = self._loaded(part).get_input_embeddings()
            try:
                yield
            finally:
                _let_go(self._embedding)
                self._embedding = None
        elif (block := self.blocks[part - 1])._modules:
            yield
        else:
            block._modules.update(list(self._loaded(part).get_decoder().layers)[part - 1]._modules)
            try:
                yield
            finally:
                for layer in block.children():
                    _let_go(layer)
                block._modules.clear()

    def holding(self, module: str) -> AbstractContextManager[None]:
        """In here a layer, by the checkpoint's name, is in memory."""
        match = re.search(r"\blayers\.(\d+)\.", module)
        frozen = match is not None and int(match[1]) < self.count
        return self.held(int(match[1]) + 1) if match and frozen else nullcontext()

    def _run(self, number: int, *args: Any, **named: Any) -> Any:
        block = self.blocks[number]
        with self.held(number + 1):
            return type(block).forward(block, *args, **named)

    def _embed(self, ids: torch.Tensor) -> Any:
        with self.held(0):
            return self._embedding(ids)

    def _loaded(self, part: int) -> Any:
        """A model that has this part's weights alone, and computes as the whole model does."""
        with torch.inference_mode(False):
            model = load_frozen(self._spec, self._device, partial(_only, part))
        use_own_code(model)
        return model

    def _check(self) -> None:
        """Raises BackendError for a model that comes with code of its own, or stands inside another."""
        folder = folder_of(self._spec)
        if folder.remote_code:
            raise self.refusal("it comes with code of its own")
        if type(config_of(folder).get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise self.refusal("it is part of a model for images or sound")

    def _without_frozen(self, model: Any) -> None:
        if not hasattr(model.get_decoder(), "layers"):
            raise self.refusal("it has no list of blocks")
        for block in list(model.get_decoder().layers)[: self.count]:
            block._modules.clear()  # what the model's own code reads of a block beside its layers stays
        if not model.all_tied_weights_keys:
            model.set_input_embeddings(Hollow(model.get_input_embeddings().num_embeddings))


def _only(part: int, model: Any) -> None:
    """Takes all weights away but those of one part, and what is small."""
    for number, block in enumerate(model.get_decoder().layers):
        if number != part - 1:
            block._modules.clear()
    if part:
        model.set_input_embeddings(Hollow())
    model.set_output_embeddings(Hollow())
    model.all_tied_weights_keys = {}


def _let_go(module: Any) -> None:
    """Frees the weights now: modules whose code was replaced refer to themselves, and would wait for the collector."""
    for part in module.modules():
        part._parameters.clear()
