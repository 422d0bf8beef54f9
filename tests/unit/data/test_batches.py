"""Which examples a step sees, and how memory cuts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backends.micro_batches import joined
from finetune.data.collate import (
    BATCH_COST,
    collate,
    evaluation_batches,
    groups,
    halve,
    label_batches,
    micro_batches,
    order,
    shared_prefix,
    step_indices,
    width,
)
from finetune.data.rows import Example

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


def beginning_alike(count: int, common: int, seed: int = 0) -> list[Example]:
    """Rows that share their first `common` tokens and go on each in its own way; the last third is supervised."""
    rng = np.random.default_rng(seed)
    start, made = rng.integers(1, 50, common), []
    for number in range(count):
        own = [60 + number, *rng.integers(1, 50, int(rng.integers(2, 40)))]
        tokens = np.array([*start, *own], np.int32)
        weights = (np.arange(len(tokens)) >= common + max(2 * len(own) // 3, 1)).astype(np.float32)
        made.append(Example(tokens, weights, f"f:{number}"))
    return made


@given(st.integers(1, 12), st.integers(0, 80), st.integers(30, 600), st.integers(0, 99))
def test_shared_prefixes_written_out_are_the_rows_as_they_were(count, common, budget, seed):
    rows = beginning_alike(count, common, seed)
    for indices, batch in evaluation_batches(rows, budget):
        assert bool(batch.prefixes) == (len(indices) > 1 and common >= 32)
        whole = joined(batch)
        for index, tokens, targets, weights in zip(indices, whole.inputs, whole.targets, whole.weights, strict=True):
            n = len(rows[index].tokens) - 1
            assert tokens[:n].tolist() == rows[index].tokens[:-1].tolist() and not tokens[n:].any()
            assert targets[:n].tolist() == rows[index].tokens[1:].tolist() and not targets[n:].any()
            assert weights[:n].tolist() == rows[index].weights[1:].tolist() and not weights[n:].any()


def test_nothing_supervised_is_ever_shared():
    rows = [Example(np.arange(50, dtype=np.int32), (np.arange(50) >= at).astype(np.float32), "f:1") for at in (40, 45)]
    assert shared_prefix(rows) == 39  # token 39 predicts the first supervised one, and stays
    assert shared_prefix([replace(row, weights=np.ones(50, np.float32)) for row in rows]) == 0
    assert shared_prefix(rows[:1]) == 0


@given(lengths, st.integers(1, 300))
def test_rows_are_cut_where_it_costs_least(sizes, budget):
    """No way to cut the sorted rows is better, all of them tried (for few rows)."""
    sizes = sizes[:7]

    def cost(cut: list[list[int]]) -> int:
        return sum(BATCH_COST + len(rows) * width(max(sizes[i] for i in rows) - 1) for rows in cut)

    found = list(groups(sizes, budget))
    order_ = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for mask in range(2 ** (len(sizes) - 1)):
        ends = [i + 1 for i in range(len(sizes) - 1) if mask >> i & 1] + [len(sizes)]
        cut = [order_[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if all(len(rows) == 1 or len(rows) * width(sizes[rows[0]] - 1) <= budget for rows in cut):
            assert cost(found) <= cost(cut)


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(1, 5), st.integers(1, 400), st.booleans())
def test_every_label_follows_every_prompt(sizes, labels, budget, share):
    prompts = [np.arange(1, size + 1, dtype=np.int32) + 100 * number for number, size in enumerate(sizes)]
    ways = [tuple(range(9000 + 10 * label, 9001 + 11 * label)) for label in range(labels)]
    seen = []
    for rows, batch in label_batches(prompts, ways, budget, share):
        whole = joined(batch)
        for row, tokens, targets, weights in zip(rows, whole.inputs, whole.targets, whole.weights, strict=True):
            prompt, label = prompts[row // labels], ways[row % labels]
            assert tokens[: len(prompt) + len(label) - 1].tolist() == [*prompt.tolist(), *label[:-1]]
            assert targets[weights > 0].tolist() == list(label)
            assert np.flatnonzero(weights)[0] == len(prompt) - 1
        seen += rows
    assert sorted(seen) == list(range(len(prompts) * labels))


def test_half_of_a_batch_keeps_the_prefixes_it_needs():
    prompts = [np.arange(10 * i + 1, 10 * i + 6, dtype=np.int32) for i in range(3)]
    ((_, batch),) = label_batches(prompts, [(7,), (8, 9)], 10**6, share=True)
    halves = halve(batch)
    assert halves is not None and [len(half.prefixes) for half in halves] == [2, 2]
    for part, half in zip((slice(0, 3), slice(3, 6)), halves, strict=True):
        assert (joined(half).inputs[:, :5] == joined(batch).inputs[part, :5]).all()


@given(st.integers(1, 12), st.integers(0, 80), st.integers(30, 600), st.booleans())
def test_numbers_of_rows_and_tokens_of_no_row_do_not_depend_on_the_cut(count, common, budget, share):
    rows = beginning_alike(count, common)
    expected = shared_prefix(rows)
    seen = []
    for batch in micro_batches(rows, budget, share):
        assert [int(target[weights > 0][-1]) for target, weights in zip(batch.targets, batch.weights, strict=True)] == [
            int(rows[number].tokens[-1]) for number in batch.rows
        ]
        assert set(batch.rowless) == {expected}
        assert [len(prefix) for prefix in batch.prefixes] == ([expected] if share and expected else [])
        seen += batch.rows
    assert sorted(seen) == list(range(count))
