"""Dropout's masks: the same bits in every framework, as random as they must be, and of nothing but their counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import dropout
from backends.interface import Batch
from backends.micro_batches import joined, numbered, padded_prefixes, parts, places_of, prefix_places

MODULES = {f"layers.{block}.{leaf}": (8, 64) for block in range(4) for leaf in ("q_proj", "k_proj", "up_proj")}
TOKENS, WIDTH = 512, 64


def masks(seed: int = 0, step: int = 0, row: int = 0, p: float = 0.5, width: int = WIDTH) -> np.ndarray:
    """[modules, tokens, width] of a row's first tokens."""
    words = dropout.token_words(seed, step, dropout.places([row], np.zeros(1, int), TOKENS, 0))
    kept = dropout.keys(words, dropout.module_words(MODULES))
    return np.stack([dropout.mask(keys, width, p) for keys in kept])


# --- the same bits ------------------------------------------------------------------------------


def by_torch(p: float, width: int, where: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from backends.torch_backend.masks import Dropout

    made = Dropout(p, 5, {"a": (1, width), "b": (1, width)}, torch.device("cpu"))
    made.at(3, where)
    return np.stack([made.mask(module, torch.zeros(where.size, width)).drawn().numpy() for module in (0, 1)])


def by_mlx(p: float, width: int, where: Any) -> np.ndarray:
    mx = pytest.importorskip("mlx.core")
    from backends.mlx_backend.lora import Dropout

    made = Dropout(p, 5, {"a": (1, width), "b": (1, width)})
    made.at(3, where)
    return np.stack([np.array(made.mask(module, mx.zeros((where.size, width)))) for module in (0, 1)])


@pytest.mark.parametrize("by", [by_torch, by_mlx])
@pytest.mark.parametrize("width", [1, 2, 63, 96])
@pytest.mark.parametrize("p", [1e-9, 0.05, 0.3, 0.5, 0.999999])
def test_every_framework_computes_the_bits_that_numpy_does(by: Callable[..., Any], width: int, p: float) -> None:
    where = dropout.places([0, 7, 2**20], np.array([0, 3, 2**17]), 40, 5)
    words = dropout.keys(dropout.token_words(5, 3, where), dropout.module_words(["a", "b"]))
    expected = np.stack([dropout.mask(keys, width, p) for keys in words])
    assert np.array_equal(by(p, width, where), expected)


def test_the_bits_stay_what_they_are() -> None:
    """A stopped run goes on with these masks: what changes them changes its result."""
    kept = masks(seed=1, step=2, row=3)[4].astype(int)  # [tokens, width]
    first = ["".join(map(str, row[:16])) for row in kept[:3]]
    assert first == ["0010111111000001", "1011110001100011", "0110010000000011"]


# --- randomness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_the_one_that_is_divided_by(p: float) -> None:
    assert dropout.kept_share(p) == pytest.approx(1 - p, abs=2**-17)
    found = masks(p=p)
    deviation = (p * (1 - p) / found.size) ** 0.5
    assert abs(found.mean() - dropout.kept_share(p)) < 4 * deviation
    for axis in range(3):  # no module, position or feature is kept more often than chance has it
        rest = tuple(other for other in range(3) if other != axis)
        counts = found.sum(rest)
        expected = dropout.kept_share(p) * found.size / len(counts)
        chi_square = float(((counts - expected) ** 2 / (expected * p)).sum())
        assert abs(chi_square - len(counts)) < 5 * (2 * len(counts)) ** 0.5


def neighbours() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What must be independent: (of what, masks, masks)."""
    first = masks()
    for distance in (1, 2, 3, 8, 32):
        yield f"features {distance} apart", first[..., :-distance], first[..., distance:]
        yield f"positions {distance} apart", first[:, :-distance], first[:, distance:]
    for one, other in combinations(range(len(MODULES)), 2):
        yield f"modules {one} and {other}", first[one], first[other]
    for step in (1, 2, 3, 256, 2**20):
        yield f"steps 0 and {step}", first, masks(step=step)
    for row in (1, 2, 64, 2**16):
        yield f"rows 0 and {row}", first, masks(row=row)
    for seed in (1, 2, 2**31):
        yield f"seeds 0 and {seed}", first, masks(seed=seed)
    yield "seed and step", masks(seed=1), masks(step=1)
    yield "a row's tokens and the next row's", first[:, 1:], masks(row=1)[:, :-1]


def test_neighbours_are_independent() -> None:
    for name, one, other in neighbours():
        both = float((one == other).mean())  # a half, where they have nothing to do with each other
        assert abs(both - 0.5) < 4.5 * 0.5 / one.size**0.5, name


def test_pairs_of_rows_and_of_columns_are_as_far_apart_as_chance_has_it() -> None:
    """Of all pairs the agreements are spread like a binomial: no two tokens, no two features go together."""
    for mask in (masks()[0], masks()[5].T):  # [n, m]
        signs = mask.astype(np.float64) * 2 - 1
        agreement = (signs @ signs.T)[np.triu_indices(len(signs), 1)] / mask.shape[1] ** 0.5  # standard normal
        assert abs(agreement.mean()) < 5 / agreement.size**0.5
        assert agreement.std() == pytest.approx(1, abs=0.05)
        assert np.abs(agreement).max() < 6.5


def test_four_neighbours_have_every_pattern_equally_often() -> None:
    """The corners of every square of positions and features: what a sum of two hashes would tie together."""
    mask = masks()[0].astype(int)
    for down, across in ((1, 1), (1, 2), (2, 1), (7, 16)):
        corners = mask[:-down, :-across], mask[down:, :-across], mask[:-down, across:], mask[down:, across:]
        pattern = sum(corner << bit for bit, corner in enumerate(corners))
        counts = np.bincount(pattern.ravel(), minlength=16)
        assert ((counts - pattern.size / 16) ** 2 / (pattern.size / 16)).sum() < 60  # 15 degrees of freedom


@pytest.mark.parametrize("weak", ["features", "tokens", "modules"])
def test_a_weak_generator_would_be_seen(weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: counters instead of hashes."""
    if weak == "features":
        monkeypatch.setattr(dropout, "feature_words", lambda width: np.arange((width + 1) // 2, dtype=np.uint32))
    if weak == "tokens":
        monkeypatch.setattr(dropout, "token_words", lambda seed, step, where: where.ravel().astype(np.uint32))
    if weak == "modules":
        monkeypatch.setattr(dropout, "module_words", lambda names: np.zeros(len(names), np.uint32))
    monkeypatch.setattr(dropout, "mixed", lambda x: x * np.uint32(dropout.FACTOR))
    with pytest.raises(AssertionError):
        test_neighbours_are_independent()
        test_four_neighbours_have_every_pattern_equally_often()


# --- places -------------------------------------------------------------------------------------


def a_step(sizes: list[int], prefix: int) -> Batch:
    """Rows of `sizes` tokens after a prefix; each row's tokens tell its number."""
    shape = (len(sizes), max(sizes))
    inputs = np.arange(len(sizes), dtype=np.int32)[:, None] + np.zeros(shape, np.int32)
    weights = (np.arange(shape[1]) < np.array(sizes)[:, None]).astype(np.float32)
    shared = {"prefixes": (np.arange(prefix, dtype=np.int32),), "prefix_of": (0,) * len(sizes)} if prefix else {}
    return Batch(inputs, inputs, weights, **shared)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5), st.integers(1, 40))
def test_a_tokens_place_is_the_same_in_every_part(sizes: list[int], prefix: int, tokens: int) -> None:
    (whole,) = numbered([a_step(sizes, prefix)])
    expected = places_of(whole)
    assert len(np.unique(expected)) == expected.size
    for form, start in ((whole, 0), (joined(whole), prefix)):
        for rows, part in parts(form, tokens):
            found = places_of(part)
            width = found.shape[1] - start
            assert np.array_equal(found[:, start:], expected[rows, :width])
            assert (found[:, :start] == np.arange(start)).all()
    if prefix:
        assert prefix_places(whole).tolist() == [list(range(prefix))]
        assert padded_prefixes(whole.prefixes).tolist() == [list(range(prefix))]


def test_rows_without_numbers_are_numbered_through_the_step() -> None:
    first, second, third = numbered([a_step([2, 2], 0), a_step([3], 0), a_step([1], 2)])
    assert (first.rows, second.rows, third.rows) == ((0, 1), (2,), (3,))
    assert np.array_equal(places_of(third), dropout.places([3], np.array([2]), 1, 2))
