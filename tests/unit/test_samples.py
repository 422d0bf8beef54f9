"""A few validation rows with their present answers: from what is measured, or written at a bounded cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.interface import OutOfMemory
from finetune.evaluation import samples
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.samples import SHARE, TOKENS, Sampler
from finetune.events import Event, Progress, Samples
from tests.unit.toy_run import LABELS, Wrapped, curve, prepared, result_of, session, trainer


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


class Writer(Wrapped):
    """Counts what it writes; each time takes `cost` seconds of a clock."""

    def __init__(self, inner: Any, clock: list[float] | None = None, cost: float = 1.0) -> None:
        super().__init__(inner)
        self.asked: list[tuple[int, int]] = []  # (prompts, tokens at most)
        self.clock, self.cost = clock, cost

    def generate(self, prompts: Any, max_tokens: int, stop: Any) -> Any:
        self.asked.append((len(prompts), max_tokens))
        if self.clock:
            self.clock[0] += self.cost
        return [[5, 6]] * len(prompts)


def rows(task: str) -> Any:
    return prepared(valid=7, task=task)


def said(sampler: Sampler, live: Any, step: int = 4) -> list[Event]:
    found = result_of(evaluate(live, sampler.prepared, sampler.prepared.valid, name="v", micro_tokens=256))
    return list(sampler.samples(live, step, found))


def test_labels_are_those_that_were_measured(tmp_path: Path) -> None:
    live = Writer(session(tmp_path))
    (shown,) = said(Sampler(rows("classification"), 50, decode), live)
    assert isinstance(shown, Samples) and shown.step == 4
    assert [row.expected for row in shown.rows] == list(LABELS), "a row of each label"
    assert all(row.answer in LABELS for row in shown.rows)
    assert live.asked == []


@pytest.mark.parametrize(("most", "asked"), [(5, 5), (500, TOKENS)])
def test_answers_are_written_for_a_few_rows_and_tokens(tmp_path: Path, most: int, asked: int) -> None:
    live = Writer(session(tmp_path))
    progress, shown = said(Sampler(rows("generation"), most, decode), live)
    assert isinstance(progress, Progress) and isinstance(shown, Samples)
    assert live.asked == [(3, asked)]
    assert {row.answer for row in shown.rows} == {"5 6"}


@pytest.mark.parametrize(("task", "most"), [("generation", 0), ("text", 50)])
def test_nothing_is_written_that_the_recipe_does_not_want(tmp_path: Path, task: str, most: int) -> None:
    live = Writer(session(tmp_path))
    assert said(Sampler(rows(task), most, decode), live) == [] and live.asked == []


def test_without_validation_rows_nothing_is_said(tmp_path: Path) -> None:
    made = prepared(valid=0)
    sampler, found = Sampler(made, 50, decode), said(Sampler(rows("text"), 0, decode), session(tmp_path))
    evaluation = result_of(evaluate(session(tmp_path), rows("text"), rows("text").valid, name="v", micro_tokens=256))
    assert found == [] and list(sampler.samples(session(tmp_path), 0, evaluation)) == []


def test_writing_takes_no_more_than_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(samples.time, "monotonic", lambda: clock[0])
    live = Writer(session(tmp_path), clock, cost=2.0)
    sampler = Sampler(rows("generation"), 50, decode)
    for _ in range(1000):
        said(sampler, live)
        clock[0] += 1.0
    spent = 2.0 * len(live.asked)
    assert 0.5 * SHARE < spent / (clock[0] - 1000.0) < 1.2 * SHARE


def test_a_model_without_memory_for_it_goes_on_without(tmp_path: Path) -> None:
    class Full(Writer):
        def generate(self, prompts: Any, max_tokens: int, stop: Any) -> Any:
            super().generate(prompts, max_tokens, stop)
            raise OutOfMemory("full")

    live = Full(session(tmp_path))
    sampler = Sampler(rows("generation"), 50, decode)
    for _ in range(3):
        assert not [event for event in said(sampler, live) if isinstance(event, Samples)]
    assert len(live.asked) == 1


def test_a_run_with_samples_is_the_same_run(tmp_path: Path) -> None:
    curves = []
    for watched in (False, True):
        made = trainer(tmp_path / str(watched), rows=rows("generation"))
        sampler, events = Sampler(made.prepared, 50, decode), []
        for event in made.events():
            events.append(event)
            if watched and made.validated and hasattr(event, "token_accuracy"):
                events += sampler.samples(made.session, event.step, made.validated)
        curves.append((curve(events), [replace(v, seconds=0.0) for v in made.state.history()]))
    assert curves[0] == curves[1]
