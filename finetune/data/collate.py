"""Examples to batches: which examples a step sees, and how memory cuts them into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch, IntArray
from finetune.data.rows import Example

WIDTHS = 8  # widths are rounded up to a multiple: fewer different shapes to compile for
SHARED_AT_LEAST = 32  # tokens; a shorter prefix saves less than a second pass through the model costs
BATCH_COST = 112  # tokens that could be computed in the time which one more micro-batch takes (measured in torch)


def order(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """For each optimiser step of an epoch the examples it sees: every example once, a short step last.

    A pure function, from the raw stream of PCG64, which numpy keeps the same in every version.
    """
    shuffled = _shuffled(n, seed, epoch)
    return [shuffled[start : start + batch_size].tolist() for start in range(0, n, batch_size)]


def step_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of a step, counted from 0 over all epochs."""
    epoch, within = divmod(step, -(-n // batch_size))
    indices: list[int] = _shuffled(n, seed, epoch)[within * batch_size : (within + 1) * batch_size].tolist()
    return indices


@lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")  # [n]


def micro_batches(
    examples: Sequence[Example], micro_tokens: int, share: bool = True, rank: int = 0, size: int = 1
) -> list[Batch]:
    """One step's examples, grouped by length, each group within micro_tokens of padded tokens.

    The longest come first, so that memory runs out at once or not at all. An example longer than the budget
    is alone in its batch. The rows' numbers are those of the examples, and which tokens are of no row depends on the
    whole step: both stay the same for any micro_tokens, without `share`, and for any number of processes.
    rank, size: of the processes that share the step, this one's rows alone.
    """
    common = shared_prefix(examples)
    prefix, made = common if share else 0, []
    lengths = [len(example.tokens) - prefix for example in examples]
    own = balanced(lengths, size)[rank]
    for group in groups([lengths[i] for i in own], micro_tokens, prefix):
        rows = [own[i] for i in group]
        batch = _collated([examples[i] for i in rows], prefix)
        made.append(replace(batch, rows=tuple(rows), rowless=(common,) * len(rows)))
    return made


def balanced(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The rows of each of so many processes, about as many tokens for each: the longest first, to whoever has least."""
    if size == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(size)]
    waiting = [(0, rank) for rank in range(size)]
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = heappop(waiting)
        shares[rank].append(row)
        heappush(waiting, (tokens + lengths[row], rank))
    return [sorted(rows) for rows in shares]


def evaluation_batches(
    examples: Sequence[Example], micro_tokens: int, share: bool = True
) -> Iterator[tuple[list[int], Batch]]:
    """Every example once, in a fixed order: (indices, batch), made one at a time.

    With `share`, the tokens with which all rows of a batch begin are its prefix (`Session.shares_prefixes`).
    """
    prefix = shared_prefix(examples) if share else 0
    for rows in groups([len(one.tokens) - prefix for one in examples], micro_tokens, prefix):
        yield rows, collate([examples[i] for i in rows], share)


def shared_prefix(examples: Sequence[Example]) -> int:
    """With how many tokens all of them begin, none of them supervised; 0 where it would save next to nothing.

    Each row keeps a token of its own, and the one that predicts its first supervised token.
    """
    if len(examples) < 2:
        return 0
    first = examples[0].tokens
    common = len(first)
    for example in examples:
        supervised = np.flatnonzero(example.weights)
        last = int(supervised[0]) if supervised.size else len(example.tokens)
        common = min(common, max(last - 1, 0), len(example.tokens) - 2)
        if common < SHARED_AT_LEAST:
            return 0
        differ = np.flatnonzero(first[:common] != example.tokens[:common])
        common = int(differ[0]) if differ.size else common
    return common if common >= SHARED_AT_LEAST else 0


def groups(lengths: Sequence[int], micro_tokens: int, prefix: int = 0) -> Iterator[list[int]]:
    """Rows of like lengths (in tokens, without those of a shared prefix) that go into one batch, the longest first.

    Of all ways to cut the sorted rows within the budget, the one with the fewest tokens to compute, padding
    counted, where a batch more costs as much as BATCH_COST tokens. A row's share of keeping the prefix's keys
    and values counts as a quarter of its tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = np.full(len(order) + 1, np.inf)  # the cost of the first so many rows
    best[0] = 0.0
    begins = np.zeros(len(order) + 1, np.int64)  # where the last batch of that way begins
    for start, row in enumerate(order):
        wide = width(lengths[row] - 1)
        most = max((micro_tokens - prefix) // (wide + prefix // 4), 1)
        ends = slice(start + 1, start + 1 + most)
        cost = best[start] + prefix + BATCH_COST + wide * np.arange(1, len(best[ends]) + 1)
        begins[ends] = np.where(cost < best[ends], start, begins[ends])
        best[ends] = np.minimum(best[ends], cost)
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(begins[cuts[-1]]))
    for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
        yield order[start:end]


def width(positions: int) -> int:
    """Of a batch whose longest row has so many positions."""
    return max(-(-positions // WIDTHS), 1) * WIDTHS


def collate(examples: Sequence[Example], share: bool = True) -> Batch:
    """Shifted and padded on the right: inputs, targets, weights [B, T]; T is rounded up to a multiple of 8."""
    return _collated(examples, shared_prefix(examples) if share else 0)


def _collated(examples: Sequence[Example], prefix: int) -> Batch:
    """`collate` of rows that begin with the same `prefix` tokens, which stand apart."""
    shape = (len(examples), width(max(len(example.tokens) for example in examples) - prefix - 1))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, example in enumerate(examples):
        n = len(example.tokens) - prefix - 1
        inputs[row, :n] = example.tokens[prefix:-1]
        targets[row, :n] = example.tokens[prefix + 1 :]
        weights[row, :n] = example.weights[prefix + 1 :]
    if not prefix:
        return Batch(inputs, targets, weights)
    return Batch(inputs, targets, weights, (examples[0].tokens[:prefix],), (0,) * len(examples))


def label_batches(
    prompts: Sequence[IntArray], labels: Sequence[Sequence[int]], micro_tokens: int, share: bool
) -> Iterator[tuple[list[int], Batch]]:
    """Every label after every prompt: (prompt x labels + label of each row, batch), the longest prompts first.

    Each prompt but for its last token is a prefix of its labels' rows, so it is computed once for all of them. A
    budget too small for all labels of a prompt cuts them.
    """
    longest = max(len(label) for label in labels)
    rows: list[int] = []
    used = 0
    for prompt in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        before = len(prompts[prompt]) - 1
        for label in range(len(labels)):
            new = not rows or rows[-1] // len(labels) != prompt
            cost = longest + (before // 4 if share else before) + (before if share and new else 0)
            if rows and used + cost > micro_tokens:
                yield rows, _label_batch(rows, prompts, labels)
                rows, used = [], 0
                cost += before if share and not new else 0
            rows.append(prompt * len(labels) + label)
            used += cost
    if rows:
        yield rows, _label_batch(rows, prompts, labels)


def _label_batch(rows: Sequence[int], prompts: Sequence[IntArray], labels: Sequence[Sequence[int]]) -> Batch:
    """Its width is the longest label's, the same in every batch of a call."""
    owners, answers = [row // len(labels) for row in rows], [labels[row % len(labels)] for row in rows]
    needed = sorted(set(owners))
    if min(len(prompts[i]) for i in needed) < 2:  # nothing is left for a prefix
        return collate([_labelled(prompts[i], label) for i, label in zip(owners, answers, strict=True)], share=False)
    shape = (len(rows), max(len(label) for label in labels))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (owner, label) in enumerate(zip(owners, answers, strict=True)):
        n = len(label)
        inputs[row, :n] = [int(prompts[owner][-1]), *label[:-1]]
        targets[row, :n] = label
        weights[row, :n] = 1.0
    prefixes = tuple(prompts[i][:-1] for i in needed)
    return Batch(inputs, targets, weights, prefixes, tuple(needed.index(i) for i in owners))


def _labelled(prompt: IntArray, label: Sequence[int]) -> Example:
    tokens = np.array([*prompt, *label], np.int32)
    return Example(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float32), location="")


def halve(batch: Batch) -> tuple[Batch, Batch] | None:
    """The upper and the lower rows, each as narrow as it can be; None for a single row."""
    rows = len(batch.inputs)
    if rows == 1:
        return None
    return _narrow(batch, slice(0, rows // 2)), _narrow(batch, slice(rows // 2, rows))


def _narrow(batch: Batch, rows: slice) -> Batch:
    """What stands after the last supervised position of all rows changes nothing, and goes; so do prefixes of none."""
    used = np.flatnonzero((batch.weights[rows] > 0).any(axis=0))  # positions
    end = min(width(int(used[-1]) + 1) if used.size else WIDTHS, batch.inputs.shape[1])
    needed = sorted(set(batch.prefix_of[rows]))
    return Batch(
        batch.inputs[rows, :end],
        batch.targets[rows, :end],
        batch.weights[rows, :end],
        tuple(batch.prefixes[i] for i in needed),
        tuple(needed.index(i) for i in batch.prefix_of[rows]),
        batch.rows[rows],
        batch.rowless[rows],
    )
