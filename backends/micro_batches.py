"""Micro-batches: validated, numbered by row, split in two, and with shared prefixes written out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.dropout import Places, places
from backends.interface import Batch, FloatArray, IntArray, Scores

Rows = NDArray[np.int64]
Positions = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows [N] and columns [N] in the whole batch
_NARROW = 256  # tokens


def check_tokens(batches: Sequence[Batch], vocabulary: int, classes: int = 0) -> None:
    """Raises ValueError for a token that a model of `vocabulary` tokens does not have, or a class that its head lacks.

    Here on the host: a GPU would find it too late, and the process could not use the device again.
    """
    for batch in batches:
        for tokens in (batch.inputs, *batch.prefixes):
            check_range(tokens, vocabulary)
        if not classes:
            check_range(batch.targets, vocabulary)
        elif wrong := [target for target in batch.targets[batch.weights != 0] if not 0 <= target < classes]:
            raise ValueError(f"class {wrong[0]} is not one of the head's {classes}")


def total_of(micro: Sequence[Batch], given: float | None = None) -> float:
    """By what a step's loss is divided: what is given, or the sum of its weights.

    Raises ValueError where nothing is supervised.
    """
    if given is not None:
        return given
    total = float(sum(np.sum(batch.weights, dtype=np.float64) for batch in micro))
    if not total > 0:
        raise ValueError("nothing is supervised in this step: all weights are 0")
    return total


def check_range(tokens: NDArray[Any], vocabulary: int) -> None:
    """Raises ValueError unless all are from 0 to `vocabulary` - 1."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        wrong = tokens[(tokens < 0) | (tokens >= vocabulary)].flat[0]
        raise ValueError(f"token {wrong} is not in the model's vocabulary of {vocabulary}")


def numbered(micro: Sequence[Batch]) -> Iterator[Batch]:
    """A step's micro-batches; where rows have no numbers, they get them in the order in which they come."""
    first = 0
    for batch in micro:
        after = first + len(batch.inputs)
        yield batch if batch.rows else replace(batch, rows=tuple(range(first, after)))
        first = after


def by_prefixes(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Those that follow one another with the same prefixes, which can then be computed once for all."""
    for _, same in groupby(batches, lambda batch: [prefix.tobytes() for prefix in batch.prefixes]):
        yield list(same)


def places_of(batch: Batch) -> Places:
    """Where the tokens of numbered rows stand in their step. [B, T]"""
    starts = np.array(_starts(batch))
    return places(batch.rows, starts, batch.inputs.shape[1], np.maximum(starts, batch.rowless or 0))


def prefix_places(batch: Batch) -> Places:
    """Where the tokens of the batch's prefixes stand, which are of no row. [P, longest]"""
    count, longest = len(batch.prefixes), max(map(len, batch.prefixes))
    return places(range(count), np.zeros(count, int), longest, longest)


def padded_prefixes(prefixes: Sequence[IntArray]) -> IntArray:
    """[P, longest], padded on the right."""
    padded = np.zeros((len(prefixes), max(map(len, prefixes))), np.int32)
    for row, prefix in zip(padded, prefixes, strict=True):
        row[: len(prefix)] = prefix
    return padded


def few_prefixes(batch: Batch, tokens: int) -> Iterator[tuple[Rows, Batch]]:
    """The rows of some prefixes at a time, of at most `tokens` with them: (rows, their batch).

    Padding counts, and a row's keys and values of its prefix as a quarter of that. A prefix is never parted from its
    rows, so those of one alone may be more.
    """
    if len(batch.prefixes) < 2:
        yield np.arange(len(batch.inputs)), batch
        return
    width, counts = batch.inputs.shape[1], np.bincount(batch.prefix_of, minlength=len(batch.prefixes))
    some: list[int] = []
    for prefix in range(len(batch.prefixes)):
        grown = [*some, prefix]
        longest = max(len(batch.prefixes[one]) for one in grown)
        if some and len(grown) * longest + counts[grown].sum() * (width + longest // 4) > tokens:
            yield _of_prefixes(batch, some)
            grown = [prefix]
        some = grown
    yield _of_prefixes(batch, some)


def _of_prefixes(batch: Batch, some: Sequence[int]) -> tuple[Rows, Batch]:
    chosen = np.flatnonzero(np.isin(batch.prefix_of, some))
    owners = tuple(some.index(batch.prefix_of[row]) for row in chosen)
    numbers, rowless = (tuple(held[row] for row in chosen) if held else () for held in (batch.rows, batch.rowless))
    arrays = batch.inputs[chosen], batch.targets[chosen], batch.weights[chosen]
    return chosen, Batch(*arrays, tuple(batch.prefixes[one] for one in some), owners, numbers, rowless)


def parts(batch: Batch, tokens: int) -> Iterator[tuple[Rows, Batch]]:
    """The rows in which anything is supervised, the longest first, at most `tokens` at a time: (rows, their batch).

    Positions after a row's last supervised one change nothing, and are left out where the whole part allows it. A row
    longer than `tokens` is a part by itself.
    """
    ends = batch.inputs.shape[1] - np.argmax(batch.weights[:, ::-1] != 0, axis=1)  # one past the last supervised
    order = np.argsort(-ends, kind="stable")
    waiting = order[(batch.weights[order] != 0).any(axis=1)]
    while waiting.size:
        width = int(ends[waiting[0]])
        rows, waiting = np.split(waiting, [max(tokens // width, 1)])
        prefix_of, numbers, rowless = (
            tuple(values[row] for row in rows) if values else ()
            for values in (batch.prefix_of, batch.rows, batch.rowless)
        )
        inputs, targets = batch.inputs[rows, :width], batch.targets[rows, :width]
        yield rows, Batch(inputs, targets, batch.weights[rows, :width], batch.prefixes, prefix_of, numbers, rowless)


def few_widths(width: int) -> int:
    """A width that rows of so many tokens are padded to, a sixteenth more at most: 16 of them in each doubling."""
    step = 2 ** ((width - 1).bit_length() - 5) if width > _NARROW else 1
    return width + -width % step


def widened(batch: Batch) -> Batch:
    """The same rows, padded on the right to one of `few_widths`."""
    width = batch.inputs.shape[1]
    if not (added := few_widths(width) - width):
        return batch
    more = ((0, 0), (0, added))
    padded: dict[str, Any] = {name: np.pad(getattr(batch, name), more) for name in ("inputs", "targets", "weights")}
    return replace(batch, **padded)


def joined(batch: Batch) -> Batch:
    """The same rows with every prefix written out before them. [B, longest prefix + T]"""
    if not batch.prefixes:
        return batch
    starts = _starts(batch)
    rows, width = batch.inputs.shape
    shape = (rows, max(starts) + width)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, start in enumerate(starts):
        prefix = batch.prefixes[batch.prefix_of[row]]
        rest = slice(start, start + width)
        inputs[row, :start], inputs[row, rest] = prefix, batch.inputs[row]
        targets[row, :start] = [*prefix[1:], batch.inputs[row, 0]]
        targets[row, rest], weights[row, rest] = batch.targets[row], batch.weights[row]
    rowless = np.maximum(starts, batch.rowless or 0)
    return Batch(inputs, targets, weights, rows=batch.rows, rowless=tuple(rowless.tolist()))


def in_row_order(batch: Batch, pieces: Iterable[tuple[Positions, FloatArray]]) -> FloatArray:
    """What the pieces hold of a batch's supervised positions [n, D] each, in one array, row by row. [N, D]

    Raises ValueError where nothing is supervised.
    """
    chosen = batch.weights != 0  # [B, T]
    number = np.cumsum(chosen).reshape(chosen.shape) - 1  # of each supervised position
    made: FloatArray | None = None
    for positions, piece in pieces:
        made = np.zeros((int(chosen.sum()), piece.shape[1]), np.float32) if made is None else made
        made[number[positions]] = piece
    if made is None:
        raise ValueError("nothing is supervised in this batch: all weights are 0")
    return made


def own_part(scores: Scores, batch: Batch) -> Scores:
    """Of the scores of `joined(batch)`, those of the batch's own positions. [B, T]"""
    if not batch.prefixes:
        return scores
    columns = np.array(_starts(batch))[:, None] + np.arange(batch.inputs.shape[1])  # [B, T]
    return Scores(np.take_along_axis(scores.logprob, columns, 1), np.take_along_axis(scores.greedy, columns, 1))


def _starts(batch: Batch) -> list[int]:
    """How many tokens stand before each row. [B]"""
    return [len(batch.prefixes[prefix]) for prefix in batch.prefix_of] or [0] * len(batch.inputs)
