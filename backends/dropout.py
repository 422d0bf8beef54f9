"""Counter-based dropout masks: a function of seed, step, row, position, module and feature, equal on every backend.

How a step is cut, what is computed again and what once for many rows change no mask. Counters are hashed, as in
Random123 (Salmon et al., 2011), in 32-bit integers, which numpy, torch and MLX multiply and shift alike:

    word[n, w] = mixed(mixed(token[n] ^ module[m]) ^ feature[w])

Each word serves two features: input 2 w + h of token n remains where half h of the word, as a signed number, is below
`limit`. N is the number of tokens, M of modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Places = NDArray[np.int64]

FACTOR = 0x45D9F3B  # of `mixed`
_OWNER = 32  # a place is its row's number, from 1 (0: of no row), above so many bits, and its position in them
_LEVELS = 2**16  # of a half word
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def places(rows: Sequence[int], starts: NDArray[Any], width: int, rowless: Any) -> Places:
    """Where each token stands in its step: its row's number, and its position in that row. [B, width]

    rows: their numbers in the step, from 0. starts [B]: the positions of their first tokens here. Positions before
    `rowless` [B] are of no row, and so are the same place in all rows, whether computed once or for each.
    """
    positions = starts[:, None] + np.arange(width, dtype=np.int64)
    owners = np.asarray(rows, np.int64)[:, None] + 1
    found: Places = np.where(positions < np.reshape(rowless, (-1, 1)), 0, owners) << _OWNER | positions
    return found


def limit(probability: float) -> int:
    """A half word below this is kept. Of 65,536 values, so many that the share dropped is `probability`, rounded."""
    dropped = min(max(round(probability * _LEVELS), 1), _LEVELS - 1)
    return _LEVELS // 2 - dropped


def kept_share(probability: float) -> float:
    """What is kept on average, exactly: what remains is divided by it."""
    return (limit(probability) + _LEVELS // 2) / _LEVELS if probability else 1.0


def token_words(seed: int, step: int, where: Places) -> Words:
    """A word for each token of a step. [..] as `where`, flattened: [N]"""
    base = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return _hashed(where.ravel().astype(np.uint64), base[0])


def module_words(modules: Iterable[str]) -> Words:
    """A word for each module, by its name. [M]"""
    digests = [hashlib.blake2b(name.encode(), digest_size=4).digest() for name in modules]
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint32)


@lru_cache(maxsize=64)
def feature_words(width: int) -> Words:
    """A word for each two features, the same whatever the width. [ceil(width / 2)]"""
    words = _hashed(np.arange((width + 1) // 2, dtype=np.uint64), _GOLDEN)
    words.flags.writeable = False
    return words


def mixed(x: Any) -> Any:
    """A bijection of 32-bit words (after T. Mueller) whose every output bit depends on the inputs' bits.

    x: uint32 of numpy or MLX, made of words that are hashed already.
    """
    x = x * FACTOR
    x = x ^ (x >> 16)
    x = x * FACTOR
    return x ^ (x >> 16)


def keys(tokens: Words, modules: Words) -> Words:
    """[M, N]"""
    found: Words = mixed(tokens ^ modules[:, None])
    return found


def mask(keys: Words, width: int, probability: float) -> NDArray[np.bool_]:
    """True where an input remains, of one module's `keys` [N]. [N, width]"""
    words = mixed(keys[:, None] ^ feature_words(width))  # [N, ceil(width / 2)]
    found: NDArray[np.bool_] = words.view(np.int16)[:, :width] < limit(probability)
    return found


def _hashed(counters: NDArray[np.uint64], base: np.uint64) -> Words:
    """The upper halves of SplitMix64's outputs (Steele et al., 2014)."""
    x = counters * _GOLDEN + base
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words: Words = ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
    return words
