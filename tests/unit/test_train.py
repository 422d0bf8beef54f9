"""The loop: its events, out of memory, numbers that are not finite, and going on after any stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends.interface import IncompatibleState, LoraSpec, ModelSpec, OptimSpec
from backends.reference import open as open_reference
from finetune.disk import checkpoint as checkpoints
from finetune.disk.metrics import MetricsFile, read
from finetune.errors import Diverged, Interrupted, MemoryExhausted
from finetune.events import (
    CheckpointDue,
    CheckpointSaved,
    Event,
    Finished,
    MemorySplit,
    Passing,
    Progress,
    RunStarted,
    StepDone,
    StoppedEarly,
    Validated,
)
from finetune.training.loop import LoopState, Trainer
from tests.unit.toy_run import Poisoned, Small, curve, model_folder, prepared, recipe, session, trainer

STEPS = 8  # of toy_run's recipe
EVENTS = 33  # of a run with it that nobody stops
WORSE = {"train": {"learning_rate": 3.0, "epochs": 10, "early_stopping": 2, "warmup": 0.0}}


def of(kind: type[Event], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[Event]]:
    """A run that nobody stopped, and its events."""
    made = trainer(tmp_path_factory.mktemp("whole"))
    return made, list(made.events())


def recorded(events: list[Event]) -> list[type[Event]]:
    """What of the events metrics.jsonl would hold."""
    return [type(event) for event in events if not isinstance(event, Passing)]


def test_the_events_come_in_order(whole: tuple[Trainer, list[Event]]) -> None:
    _, events = whole
    due = [RunStarted, Validated, CheckpointSaved]
    for step in range(1, STEPS + 1):
        due += [StepDone, *[Validated] * (step % 2 == 0), *[CheckpointSaved] * (step % 3 == 0 or step == STEPS)]
    assert recorded(events) == [*due, Finished]
    assert [event.step for event in of(StepDone, events)] == list(range(1, STEPS + 1))
    assert [event.step for event in of(Validated, events)] == [0, 2, 4, 6, 8]
    assert events[0] == RunStarted(0, STEPS, 4, resumed=False)


def test_a_checkpoint_is_announced_and_written_only_when_the_next_event_is_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    announced = []
    for event in made.events():
        saved = made.checkpoints.folder / f"step-{event.step:08d}"
        if isinstance(event, CheckpointDue):
            announced.append(event.step)
            assert not saved.exists()
        elif isinstance(event, CheckpointSaved):
            assert announced[-1] == event.step and str(saved) == event.path and saved.exists()
    assert announced == [0, 3, 6, 8]


def test_a_validation_tells_how_far_it_is(whole: tuple[Trainer, list[Event]]) -> None:
    _, events = whole
    progress = of(Progress, events)
    assert {event.step for event in progress} == {0, 2, 4, 6, 8}
    assert {event.what for event in progress} <= {"validation: loss", "validation: labels"}
    assert all(0 <= event.done <= event.total for event in progress)


def test_a_step_tells_what_it_did(whole: tuple[Trainer, list[Event]]) -> None:
    made, events = whole
    steps = of(StepDone, events)
    assert [event.epoch for event in steps] == [step / 4 for step in range(1, STEPS + 1)]
    first = sum(event.useful_tokens for event in steps[:4])
    assert first == sum(len(one.tokens) for one in made.prepared.train.examples)  # each once an epoch
    assert sum(event.tokens for event in steps[:4]) == sum(
        int(one.weights.sum()) for one in made.prepared.train.examples
    )


def test_the_training_loss_of_a_validation_is_the_mean_over_tokens_since_the_last(
    whole: tuple[Trainer, list[Event]],
) -> None:
    _, events = whole
    steps, found = of(StepDone, events), of(Validated, events)
    assert found[0].train_loss is None
    for one in found[1:]:
        since = [event for event in steps if one.step - 2 < event.step <= one.step]
        mean = sum(event.loss * event.tokens for event in since) / sum(event.tokens for event in since)
        assert one.train_loss == pytest.approx(mean, rel=1e-12)
        assert one.perplexity == pytest.approx(math.exp(one.loss))


def test_the_best_adapter_is_kept(tmp_path: Path) -> None:
    made = trainer(tmp_path, asked=recipe(train={"learning_rate": 3.0, "epochs": 6}))
    adapters: dict[int, Any] = {}
    found = []
    for event in made.events():
        if isinstance(event, Validated):
            adapters[event.step] = made.session.get_state().adapter
            found.append(event)
    best = min(found, key=lambda one: one.loss)
    assert (made.state.best_step, made.state.best_loss) == (best.step, best.loss)
    assert best.step < found[-1].step, "the run should end worse than its best"
    assert made.best is not None
    assert all(made.best[name].tobytes() == adapters[best.step][name].tobytes() for name in made.best)


def test_early_stopping_waits_for_its_patience(tmp_path: Path) -> None:
    made = trainer(tmp_path, asked=recipe(**WORSE))
    events = list(made.events())
    found = of(Validated, events)
    (stopped,) = of(StoppedEarly, events)
    best = max(i for i, one in enumerate(found) if one.best)
    assert len(found) - 1 - best == 2
    assert stopped == StoppedEarly(found[-1].step, found[best].step, found[best].loss)
    assert recorded(events)[-3:] == [StoppedEarly, CheckpointSaved, Finished]
    assert stopped.step < made.plan.steps


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    list(trainer(tmp_path, asked=recipe(**WORSE)).events())
    again = trainer(tmp_path, asked=recipe(**WORSE))
    again.restore(_newest(tmp_path))
    assert recorded(list(again.events())) == [RunStarted, Finished]


def test_a_validation_set_smaller_than_a_batch_and_one_row_are_enough(tmp_path: Path) -> None:
    events = list(trainer(tmp_path, rows=prepared(train=1, valid=1)).events())
    assert len(of(StepDone, events)) == 2
    assert all(math.isfinite(one.loss) for one in of(Validated, events))


# Out of memory


def test_out_of_memory_splits_and_learns_the_same(tmp_path: Path, whole: tuple[Trainer, list[Event]]) -> None:
    plain = list(trainer(tmp_path / "plain", session(tmp_path / "m")).events())
    small = Small(session(tmp_path / "m"), limit=24)
    events = list(trainer(tmp_path / "small", small).events())
    assert of(MemorySplit, events), "the limit should have been met"
    assert small.largest <= 24
    for ours, theirs in zip(curve(events), curve(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    budgets = [one.micro_tokens for one in of(MemorySplit, events)]
    assert budgets == sorted(budgets, reverse=True)
    assert of(MemorySplit, events)[-1].step < STEPS // 2, "the budget is kept, not found anew at every step"


def test_a_validation_row_that_does_not_fit_alone_ends_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, Small(session(tmp_path / "m"), limit=23))
    with pytest.raises(MemoryExhausted, match=r"valid\.jsonl:\d+: this row alone") as caught:
        list(made.events())
    assert caught.value.exit_code == 5


def test_a_training_row_that_does_not_fit_alone_names_its_length(tmp_path: Path) -> None:
    class SmallSteps(Small):
        def score(self, batch: Any) -> Any:
            return self.inner.score(batch)

    made = trainer(tmp_path, SmallSteps(session(tmp_path / "m"), limit=15))
    with pytest.raises(MemoryExhausted, match=r"a single row of (16|24) tokens does not fit"):
        list(made.events())
    assert _newest(tmp_path).state.step == made.session.get_state().step == 0


# Not finite


@pytest.mark.parametrize("bad", [1, 2, 4, 5, 8])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_does_harm(tmp_path: Path, bad: int) -> None:
    made = trainer(tmp_path, Poisoned(session(tmp_path / "m"), step=bad), rows=prepared())
    events = []
    with pytest.raises(Diverged) as caught:
        for event in made.events():
            events.append(event)
    assert caught.value.exit_code == 4
    assert f"step {bad}: " in str(caught.value)
    named = [one.location for one in made.prepared.train.examples if one.location in str(caught.value)]
    assert len(named) >= 1
    assert [event.step for event in of(StepDone, events)] == list(range(1, bad))
    saved = _newest(tmp_path)
    assert saved.state.step == max(step for step in (0, 3, 6) if step < bad)
    assert np.isfinite(saved.loop["best_loss"])
    _nothing_but_finite(tmp_path)


@pytest.mark.parametrize("bad", [0, 2, 6])
def test_a_validation_loss_that_is_not_finite_ends_the_run_too(tmp_path: Path, bad: int) -> None:
    made = trainer(tmp_path, Poisoned(session(tmp_path / "m"), scores=bad))
    with pytest.raises(Diverged, match=f"step {bad}: the validation loss is nan"):
        list(made.events())
    _nothing_but_finite(tmp_path)


def _nothing_but_finite(folder: Path) -> None:
    for file in (folder / "checkpoints").rglob("*.safetensors"):
        assert all(np.isfinite(tensor).all() for tensor in load_file(file).values())
    for file in (folder / "checkpoints").rglob("loop.json"):
        assert "NaN" not in file.read_text()
        assert "Infinity" not in file.read_text()


# Going on


def _newest(folder: Path) -> checkpoints.Checkpoint:
    saved, messages = checkpoints.load_newest(folder / "checkpoints")
    assert saved is not None
    assert not messages
    return saved


def _through_metrics(
    folder: Path, made: Trainer, first: int, take: int | None = None, stop: Callable[[Event], bool] | None = None
) -> None:
    """The events into metrics.jsonl, as a run writes them.

    take: only so many, as if the power failed then. stop: asks the trainer to stop after an event.
    """
    with MetricsFile(folder / "metrics.jsonl") as metrics:
        metrics.truncate_after(first)
        for event in islice(made.events(), take):
            metrics.record(event)
            made.stopping = made.stopping or (stop is not None and stop(event))


def _resume(folder: Path) -> Trainer:
    """What `resume` does."""
    made = trainer(folder)
    saved, _ = checkpoints.load_newest(folder / "checkpoints")
    if saved is not None:
        made.restore(saved)
    _through_metrics(folder, made, -1 if saved is None else saved.state.step)
    return made


def _same(folder: Path, made: Trainer, whole: tuple[Trainer, list[Event]]) -> None:
    other, events = whole
    ours, theirs = made.session.get_state(), other.session.get_state()
    for mine, its in ((ours.adapter, theirs.adapter), (ours.moments, theirs.moments), (made.best, other.best)):
        assert mine is not None
        assert its is not None
        assert {name: value.tobytes() for name, value in mine.items()} == {n: v.tobytes() for n, v in its.items()}
    assert made.state == other.state
    written = read(folder / "metrics.jsonl")
    assert curve(written) == curve(events)
    seen = [replace(one, seconds=0.0) for one in of(Validated, written)]
    assert seen == [replace(one, seconds=0.0) for one in of(Validated, events)] == made.state.history()
    last = f"checkpoints/step-{STEPS:08d}"
    for file in (other.checkpoints.folder.parent / last).iterdir():
        assert file.read_bytes() == (folder / last / file.name).read_bytes(), file.name


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_stopped_after_any_step_it_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Trainer, list[Event]], stop: int
) -> None:
    made = trainer(tmp_path)
    with pytest.raises(Interrupted, match=f"^stopped after step {stop}$"):
        _through_metrics(tmp_path, made, -1, stop=lambda event: isinstance(event, StepDone) and event.step == stop)
    assert _newest(tmp_path).state.step == stop
    _same(tmp_path, _resume(tmp_path), whole)


@pytest.mark.parametrize("taken", range(EVENTS))
def test_killed_after_any_event_it_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Trainer, list[Event]], taken: int
) -> None:
    assert len(whole[1]) == EVENTS
    _through_metrics(tmp_path, trainer(tmp_path), -1, taken)
    _same(tmp_path, _resume(tmp_path), whole)


def test_stopped_after_every_single_step_it_still_ends_the_same(
    tmp_path: Path, whole: tuple[Trainer, list[Event]]
) -> None:
    for _ in range(STEPS):
        made = trainer(tmp_path)
        saved, _ = checkpoints.load_newest(tmp_path / "checkpoints")
        if saved is not None:
            made.restore(saved)
        with pytest.raises(Interrupted):
            step = -1 if saved is None else saved.state.step
            _through_metrics(tmp_path, made, step, stop=lambda event: True)
    _same(tmp_path, _resume(tmp_path), whole)


@pytest.mark.parametrize("stop", [0, 2, 4, 8])
def test_stopped_during_a_validation_it_is_made_again(tmp_path: Path, stop: int) -> None:
    small = recipe(train={"micro_tokens": 40})
    made = trainer(tmp_path, asked=small)
    with pytest.raises(Interrupted, match=f"^stopped during the validation after step {stop}$"):
        _through_metrics(tmp_path, made, -1, stop=lambda event: isinstance(event, Progress) and event.step == stop)
    assert _newest(tmp_path).state.step == stop
    assert all(one.step < stop for one in made.state.history())
    again = trainer(tmp_path, asked=small)
    again.restore(_newest(tmp_path))
    _through_metrics(tmp_path, again, stop)
    other = trainer(tmp_path / "other", asked=small)
    _same(tmp_path, again, (other, list(other.events())))


def test_the_budget_that_memory_set_is_remembered(tmp_path: Path) -> None:
    made = trainer(tmp_path, Small(session(tmp_path / "model"), limit=24))
    with pytest.raises(Interrupted):
        _through_metrics(tmp_path, made, -1, stop=lambda event: isinstance(event, StepDone) and event.step == 4)
    again = trainer(tmp_path, Small(session(tmp_path / "model"), limit=24))
    again.restore(_newest(tmp_path))
    assert again.state.micro_tokens == made.state.micro_tokens < recipe().train.micro_tokens


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path) -> None:
    next(event for event in trainer(tmp_path).events() if isinstance(event, CheckpointSaved))
    wider = open_reference(ModelSpec(model_folder(tmp_path / "m")), LoraSpec(3, 4.0), OptimSpec(), 0)
    with pytest.raises(IncompatibleState, match=r"\[2, 32\], needed \[3, 32\]"):
        trainer(tmp_path, wider).restore(_newest(tmp_path))


def test_the_loops_state_is_json_and_comes_back() -> None:
    fresh = LoopState(64)
    assert fresh.to_json()["best_loss"] is None
    assert LoopState.from_json(fresh.to_json()) == fresh


def test_the_loop_is_lazy(tmp_path: Path) -> None:
    events: Iterator[Event] = trainer(tmp_path).events()
    next(events)
    assert not (tmp_path / "checkpoints").exists()
