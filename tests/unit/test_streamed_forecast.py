"""When a model is streamed, and what is predicted of it: memory, disk and time, from sizes alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from backends import registry
from backends.memory_plan import weight_bytes
from backends.weight_plan import frozen_file_bytes, streamed_bytes
from finetune.events import Work
from finetune.recipe.load import check_recipe
from finetune.training import memory_settings, read_ahead
from finetune.training.budget import LEAST, Workload, has_to_stream
from finetune.training.forecast import forecast_here, forecast_on
from finetune.training.job import Job
from finetune.training.memory_settings import settle_memory
from finetune.training.speed import Speed
from tests.unit.test_forecast import planned, rows, work
from tests.unit.test_memory_plan import HALF, architecture

COSTS = {(name, kind): registry.costs(name, kind) for name in ("torch", "mlx") for kind in ("cpu", "gpu")}  # type: ignore[arg-type]


def top(**changes: Any) -> Workload:
    """The uppermost of four blocks is adapted."""
    return work(last=1, streamable=True, **changes)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("unsettled", [False, True])
def test_a_model_is_streamed_where_its_smallest_step_does_not_fit(backend: str, unsettled: bool) -> None:
    asked, costs = top(unsettled=unsettled), COSTS[backend, "cpu"]
    smallest = replace(asked, model=replace(asked.model, checkpointing=unsettled)).memory(LEAST, costs).peak
    for memory, streamed in ((smallest, False), (smallest - 1, True), (1.0, True), (None, False)):
        found = asked.settled(costs, memory, None)
        assert found.model.streamed == streamed
        assert found.settled(costs, memory, None).model == found.model


@pytest.mark.parametrize("asked", [work(last=99, streamable=True), work(last=1), work(last=4, streamable=True)])
def test_a_model_without_frozen_blocks_or_with_its_own_code_is_never_streamed(asked: Workload) -> None:
    assert not asked.settled(COSTS["torch", "cpu"], 1.0, None).model.streamed


def test_a_backend_that_cannot_stream_does_not() -> None:
    assert not top().settled(registry.costs("reference", "cpu"), 1.0, None).model.streamed


@pytest.mark.parametrize("costs", COSTS.values())
@pytest.mark.parametrize("frozen", [1, 2, 3])
@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_streamed_weights_are_what_is_held_and_the_largest_part_beside_it(
    costs: Any, frozen: int, quantize: str
) -> None:
    shape = replace(architecture(4), embedding=0)
    whole = weight_bytes(shape, quantize, 2, costs)
    block = (whole - shape.other * 2) / 4
    assert streamed_bytes(shape, quantize, 2, costs, frozen) == pytest.approx(whole - (frozen - 1) * block)
    apart = replace(shape, embedding=shape.other // 2)  # read like a block
    held = whole - frozen * block - apart.embedding * 2
    assert streamed_bytes(apart, quantize, 2, costs, frozen) == pytest.approx(held + max(block, apart.embedding * 2))
    assert frozen_file_bytes(replace(shape, stored=1000), frozen) < 1000 * frozen / 4


def test_memory_that_is_predicted_is_below_that_of_a_model_held_whole() -> None:
    for costs in COSTS.values():
        whole = top().memory(LEAST, costs)
        streamed = replace(top(), model=replace(top().model, streamed=True)).memory(LEAST, costs)
        assert streamed.weights < whole.weights and streamed.loading <= whole.loading
        assert streamed.activations == whole.activations


def test_several_processes_hold_their_models_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "free_bytes", lambda *_: 1000)
    monkeypatch.setattr(registry, "describe", lambda *_: {"device": "cpu", "half": "bfloat16"})
    monkeypatch.setattr(registry, "measured_rate", lambda *_: 1e9)
    assert [forecast_here(top(), "torch", 64, count).streamed for count in (1, 2)] == [True, False]


def test_another_machine_streams_too() -> None:
    _, machine = registry.machines()[0]
    name, tight = "mlx", replace(machine, memory=1000.0)
    assert forecast_on(tight, top(), name, 64).streamed and not forecast_on(machine, top(), name, 64).streamed


@pytest.mark.parametrize("recomputed", [None, False])
def test_a_run_says_what_streaming_costs(recomputed: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "lora": {"layers": 1}}
    recipe = check_recipe(values | {"train": {"gradient_checkpointing": "auto"}})
    shape = replace(top(unsettled=True), architecture=replace(architecture(4), stored=4 * 10**9))
    monkeypatch.setattr(memory_settings, "workload", lambda *_: shape)
    monkeypatch.setattr(registry, "describe", lambda *_: {"device": "cpu", "half": "bfloat16"})
    folder: Any = SimpleNamespace(weights={"file": ()})

    def settled(free: int, streamed: bool | None = None) -> tuple[bool | None, list[str]]:
        monkeypatch.setattr(registry, "free_bytes", lambda *_: free)
        work = Work(
            settle_memory(Job(recipe, folder, cast(Any, None), "torch", rows(20), streamed=streamed), recomputed)
        )
        notes = [note.text for note in work]
        return work.result.streamed, notes

    chosen, notes = settled(10**6)
    assert chosen is True and "its 3 frozen blocks of 4 are read from the disk" in notes[0]
    assert re.search(r"\d\.\d\d GB in a pass: one for all rows, and one for each token of an answer", notes[0])
    assert settled(10**15) == (False, [])
    assert settled(10**6, streamed=False)[0] is False  # a run of several processes


def test_answers_wait_for_the_disk() -> None:
    asked = top(architecture=replace(architecture(4), stored=4 * 10**9))
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}})
    streamed = replace(asked, model=replace(asked.model, streamed=True))
    whole, slow = (outlook_of(recipe, one) for one in (asked, streamed))
    assert slow["base model: answers"] - whole["base model: answers"] == pytest.approx(
        recipe.evaluate.max_tokens * frozen_file_bytes(asked.architecture, 3) / 1e9
    )
    assert slow["frozen blocks"] == pytest.approx(frozen_file_bytes(asked.architecture, 3) / 1e9)
    assert slow["training"] == whole["training"] and "frozen blocks" not in whole


def outlook_of(recipe: Any, one: Workload) -> dict[str, float]:
    from finetune.training.predicted_time import seconds_of_parts

    return seconds_of_parts(recipe, rows(20, task="generation"), one, Speed(1e12), 256)


def test_rows_that_are_known_ahead_are_counted_once() -> None:
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}})
    prepared = rows(20)
    found = read_ahead.kept_bytes(recipe, prepared, work(last=1, model=HALF), "cpu")
    # 39 tokens of each training row; the others are such rows again, and a label of one token has the same before it
    row = 39 * architecture().hidden * 2
    assert found == 20 * row
    other = replace(prepared.train.examples[0], tokens=np.arange(40, dtype=np.int32))
    more = replace(prepared, train=replace(prepared.train, examples=(*prepared.train.examples, other)))
    assert read_ahead.kept_bytes(recipe, more, work(last=1, model=HALF), "cpu") == found + row


def test_the_plan_tells_of_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "free_bytes", lambda *_: 1000)
    monkeypatch.setattr(registry, "describe", lambda *_: {"device": "cpu", "half": "bfloat16"})
    monkeypatch.setattr(registry, "measured_rate", lambda *_: 1e9)
    text = planned(tmp_path, backend="torch", lora={"layers": 1})
    assert re.search(r"frozen blocks read from the disk, in a pass +0\.\d\d", text)
    assert re.search(r"temporary file on disk \(frozen blocks\) +0\.\d\d", text)
    assert re.search(r"frozen blocks +one pass", text)
    assert not has_to_stream(check_recipe({"model": {"path": "m"}, "data": {"train": "t"}}), cast(Any, None), "torch")
