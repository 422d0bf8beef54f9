"""Dropout's masks in torch: drawn from the seed and the place of a token, the same as on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from backends import dropout
from backends.interface import BackendError, Modules
from backends.torch_backend.device import uploaded


class Keys(NamedTuple):
    """The words of the tokens that are run, for each module."""

    words: torch.Tensor  # [M, N + 3] at most: each module's begin at a multiple of 16 bytes
    tokens: int


class Mask(NamedTuple):
    """A mask [N, in] before it is drawn: True where an input is kept."""

    keys: torch.Tensor  # [N]
    features: torch.Tensor  # [ceil(in / 2)]
    width: int
    limit: int

    def drawn(self) -> torch.Tensor:
        words = _mixed(self.keys[:, None] ^ self.features)  # [N, ceil(in / 2)]
        return words.view(torch.int16)[:, : self.width] < self.limit


class Dropout:
    """The masks of `backends.dropout` for the adapters' inputs; off outside a step. Words are int32, which wraps."""

    def __init__(self, probability: float, seed: int, modules: Modules, device: torch.device) -> None:
        self.keep = dropout.kept_share(probability)
        self._limit, self._seed, self._names = dropout.limit(probability), seed, list(modules)
        words = {width: dropout.feature_words(width) for _, width in modules.values()} if probability else {}
        self._features = {width: _int32(word, device) for width, word in words.items()}
        self._modules = _int32(dropout.module_words(modules), device)[:, None]  # [M, 1]
        self._keys: Keys | None = None  # of the tokens that are run now; None: not training

    def at(self, step: int, where: dropout.Places) -> None:
        """From here on the tokens at these places are run, in a step that comes after `step` others."""
        if self._features:
            words = dropout.token_words(self._seed, step, where).view(np.int32)
            padded = np.pad(words, (0, -len(words) % 4))
            self._keys = Keys(_mixed(self._modules ^ uploaded([padded], self._modules.device)[0]), len(words))

    def off(self) -> None:
        self._keys = None

    @property
    def keys(self) -> Keys | None:
        """Those of the tokens that are run now, for `as_of`."""
        return self._keys

    @contextmanager
    def as_of(self, keys: Keys | None) -> Iterator[None]:
        """In here the tokens are run again that `keys` was taken for."""
        before, self._keys = self._keys, keys
        try:
            yield
        finally:
            self._keys = before

    def mask(self, module: int, x: torch.Tensor) -> Mask | None:
        """That of the inputs x [..., in]; None: all are kept.

        Raises BackendError where N is another.
        """
        if self._keys is None:
            return None
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        words, tokens = self._keys
        if rows != tokens:
            raise BackendError(
                f"{self._names[module]} is run on {rows} inputs for {tokens} tokens, so dropout does not know "
                "which is whose; set lora.dropout: 0, or leave the layer out of lora.targets"
            )
        return Mask(words[module, :tokens], self._features[width], width, self._limit)


def _int32(words: dropout.Words, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32).copy()).to(device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """`dropout.mixed`, in place: x ^ (x >> 16) is the lower halves ^ the upper ones, in one pass."""
    halves = x.view(torch.int16)
    lower, upper = halves[..., 0::2], halves[..., 1::2]
    for _ in range(2):
        x.mul_(dropout.FACTOR)
        lower.bitwise_xor_(upper)
    return x
