"""Time of what is not a product: norms, activations and softmax, which on a processor is most of a small model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.predictions import NOTHING, Elementwise
from finetune.data.rows import Example
from finetune.events import Progress
from finetune.training import predicted_time
from finetune.training.extra_evaluations import Seconds
from finetune.training.predicted_time import LONGEST, timed
from finetune.training.sampled_steps import Rows
from finetune.training.speed import Speed
from tests.unit.test_forecast import work
from tests.unit.test_predicted_before import ROWS, recipe

NO_PRODUCTS = Speed(1e99, beside=False)
NUMBER, SCORE, LOGIT = Elementwise(number=1.0), Elementwise(score=1.0), Elementwise(logit=1.0)


def seconds(kind: Elementwise, lengths: list[int], last: int = 99) -> float:
    """Of one epoch of training with that kind of work alone."""
    return work(lengths, last, batch_size=16).seconds(replace(NO_PRODUCTS, elementwise=kind), 4096)


def test_each_number_of_a_layer_counts_in_both_passes() -> None:
    widths = sum(out + inputs for out, inputs in work().architecture.modules.values())
    assert seconds(NUMBER, [97] * 16) == pytest.approx(2 * 16 * 96 * widths)
    assert seconds(NUMBER, [97] * 8 + [50] * 8) > seconds(NUMBER, [97] * 8 + [20] * 8)


def test_scores_grow_with_the_square_of_a_rows_tokens_and_with_heads_and_blocks() -> None:
    shape = work().architecture
    assert seconds(SCORE, [97] * 16) == pytest.approx(2 * 16 * 96**2 * shape.heads * shape.blocks)
    assert seconds(SCORE, [193] * 16) == pytest.approx(4 * seconds(SCORE, [97] * 16))


def test_logits_count_where_the_loss_is_taken() -> None:
    few = [Example(np.arange(97, dtype=np.int32), np.eye(1, 97, 5, dtype=np.float32)[0], "a:1")] * 16
    made, speed = work(examples=few, batch_size=16), replace(NO_PRODUCTS, elementwise=LOGIT)
    assert made.seconds(speed, 4096) == pytest.approx(2 * 16 * made.architecture.vocabulary)
    head = replace(made, lora=replace(made.lora, classes=3))
    assert head.seconds(speed, 4096) == pytest.approx(2 * 16 * 3)
    assert Seconds(recipe(), ROWS, made, speed, 4096).reading(few) == pytest.approx(16 * made.architecture.vocabulary)


def test_frozen_blocks_have_no_backward_pass_and_are_computed_once() -> None:
    whole, half = (seconds(NUMBER, [97] * 16, last) for last in (99, 2))  # of four blocks, over three epochs
    assert half == pytest.approx(whole * (2 * 2 + 2 / 3) / (4 * 2))


@pytest.mark.parametrize("kind", [NUMBER, SCORE, LOGIT])
def test_reading_and_writing_take_it_too(kind: Elementwise) -> None:
    made = Seconds(recipe(), ROWS, work(), replace(NO_PRODUCTS, elementwise=kind), 4096)
    assert made.reading(ROWS.valid.examples) > 0
    assert made.writing([5, 9], 16) > made.writing([5, 9], 8) > 0
    assert replace(made, speed=replace(made.speed, slower=2.0)).writing([5], 8) == 2 * made.writing([5], 8)


def test_a_layer_starts_again_for_each_piece_that_is_computed_together() -> None:
    speed = Speed(1e99, host=1.0, beside=False)
    made = work([97] * 16, batch_size=16)  # 1,536 positions; five rows of 96 are at most 512
    layers = len(made.architecture.modules)
    for at_once, pieces in ((None, 1), (512, 4), (1024, 2), (8, 16)):
        assert made.seconds(replace(speed, at_once=at_once), 4096) == pytest.approx(pieces * 3 * layers)
        read = Seconds(recipe(), ROWS, made, replace(speed, at_once=at_once), 4096)
        assert read.passes(Rows.of([96] * 16), 0) == pytest.approx(-(-1536 // (at_once or 4096)) * layers)


def test_rows_that_would_be_timed_too_long_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine, or one that others use too, is the one whose prediction most needs it."""
    now, counts = [0.0], list[int]()
    monkeypatch.setattr(predicted_time.time, "perf_counter", lambda: now[0])
    made = Seconds(recipe(), ROWS, work(examples=list(ROWS.train.examples)), Speed(1e12, beside=False), 4096)
    whole = made.reading(list(ROWS.train.examples))
    slow = replace(made, speed=Speed(1e12 * whole / (5 * LONGEST), beside=False))  # five seconds for all

    def scored(session: object, rows: Any, tokens: int) -> Any:
        counts.append(len(rows))
        now[0] += 3 * slow.reading(rows)
        yield Progress(0, "loss", 1, 1)

    monkeypatch.setattr(predicted_time, "row_losses", scored)
    assert timed(None, slow) == pytest.approx(3.0)  # type: ignore[arg-type]
    assert 0 < counts[0] < len(ROWS.train.examples) and slow.reading(ROWS.train.examples[: counts[0]]) <= LONGEST


def test_processes_share_it() -> None:
    costs = registry.costs("mlx", "cpu")
    one, two = (Speed.of(costs, 1e12, processes).elementwise for processes in (1, 2))
    assert one == costs.elementwise and [*two] == [each / 2 for each in one]


def test_a_gpu_is_taken_to_do_it_within_the_products() -> None:
    assert all(registry.costs(name, "gpu").elementwise == NOTHING for name in ("torch", "mlx"))
    assert registry.costs("mlx", "cpu").elementwise != NOTHING
