"""Which examples a step sees, and how memory cuts them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import collate, evaluation_batches, halve, micro_batches, order, step_indices
from finetune.examples import Example

lengths = st.lists(st.integers(2, 70), min_size=1, max_size=40)


def examples(sizes: list[int]) -> list[Example]:
    """Examples whose tokens tell which they are; the last half is supervised."""
    made = []
    for number, size in enumerate(sizes):
        weights = np.arange(size) >= max(size // 2, 1)
        made.append(Example(np.full(size, number + 1, np.int32), weights.astype(np.float32), f"f:{number}"))
    return made


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_example_once_an_epoch(n, batch_size, seed, epoch):
    steps = order(n, batch_size, seed, epoch)
    assert sorted(i for step in steps for i in step) == list(range(n))
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    for within, step in enumerate(steps):
        assert step_indices(n, batch_size, seed, epoch * len(steps) + within) == step


def test_order_is_fixed_for_good():
    assert order(10, 4, 0, 0) == [[3, 2, 1, 8], [6, 0, 7, 4], [5, 9]]
    assert order(10, 4, 0, 1) != order(10, 4, 0, 0) != order(10, 4, 1, 0)


def test_collate_shifts_and_pads():
    first = Example(np.array([7, 8, 9], np.int32), np.array([0, 0, 1], np.float32), "f:1")
    second = Example(np.array([4, 5, 6, 3, 2], np.int32), np.array([0, 1, 1, 0, 1], np.float32), "f:2")
    batch = collate([first, second])
    assert batch.inputs.tolist() == [[7, 8, 0, 0, 0, 0, 0, 0], [4, 5, 6, 3, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 0, 0, 0, 0, 0, 0], [5, 6, 3, 2, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]]
    assert (batch.inputs.dtype, batch.targets.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)


@given(lengths, st.integers(1, 300))
def test_micro_batches_are_a_partition_within_the_budget(sizes, budget):
    rows = examples(sizes)
    batches = micro_batches(rows, budget)
    seen = sorted(int(row[0]) - 1 for batch in batches for row in batch.inputs)
    assert seen == list(range(len(rows)))
    assert sum(batch.weights.sum() for batch in batches) == sum(row.weights[1:].sum() for row in rows)
    for batch in batches:
        assert batch.inputs.size <= budget or len(batch.inputs) == 1
        assert batch.inputs.shape[1] % 8 == 0
        assert not batch.weights[batch.targets == 0].any()  # padding


@given(lengths, st.integers(1, 300))
def test_evaluation_sees_every_row_and_knows_which(sizes, budget):
    rows = examples(sizes)
    seen = []
    for indices, batch in evaluation_batches(rows, budget):
        assert [int(row[0]) - 1 for row in batch.inputs] == indices
        seen += indices
    assert sorted(seen) == list(range(len(rows)))


@given(lengths)
def test_halves_hold_every_supervised_token(sizes):
    batch = collate(examples(sizes))
    halves = halve(batch)
    if len(sizes) == 1:
        assert halves is None
        return
    assert halves is not None and len(halves[0].inputs) == len(sizes) // 2
    start = 0
    for half in halves:
        rows = slice(start, start + len(half.inputs))
        width = half.inputs.shape[1]
        assert (half.targets == batch.targets[rows, :width]).all() and not batch.weights[rows, width:].any()
        start += len(half.inputs)
    assert start == len(sizes)


def test_halves_are_as_narrow_as_they_can_be():
    halves = halve(collate(examples([60, 5])))
    assert halves is not None and [half.inputs.shape for half in halves] == [(1, 64), (1, 8)]
