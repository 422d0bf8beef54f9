"""Several processes share a run: the same curve, the same bytes, one sum a step, and an end for all where one fails."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry, team
from backends.interface import Batch, LoraSpec, ModelSpec, NonFinite, OptimSpec, OutOfMemory, Scores, Session
from backends.process_group import side_by_side
from backends.process_messages import batch_arrays, batch_of, pack, unpack
from backends.team import Apart
from finetune.data.collate import balanced, micro_batches
from finetune.data.rows import Prepared
from finetune.disk.shared_rows import NAME, content_of, read_rows, remove_rows, write_rows
from finetune.errors import Diverged, Incompatible, MemoryExhausted
from finetune.evaluation.evaluate import base_weights, evaluate
from finetune.evaluation.scoring import write_tokens
from finetune.events import Event, MemorySplit, StepDone
from finetune.training.loop import Trainer
from tests.unit.threads import together
from tests.unit.toy_run import curve, dataset, model_folder, prepared, recipe, result_of, session, trainer

ROWS = prepared(train=29, valid=11)
ROWS_SCORED = micro_batches(ROWS.valid.examples, 1000, False)[0]


def run(folder: Path, live: Session, rows: Prepared = ROWS, **train: Any) -> tuple[Trainer, list[Event]]:
    made = trainer(folder, live, recipe(train={"epochs": 3, "batch_size": 6} | train), rows)
    return made, list(made.events())


def close(ours: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]]) -> None:
    assert [(one[0], one[3], one[4]) for one in ours] == [(one[0], one[3], one[4]) for one in theirs]
    np.testing.assert_allclose([one[1:3] for one in ours], [one[1:3] for one in theirs], rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[Event]]:
    folder = tmp_path_factory.mktemp("alone")
    return run(folder, session(folder / "model"), micro_tokens=60)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_curve_is_that_of_one_process_with_one_sum_a_step(
    tmp_path: Path, alone: tuple[Trainer, list[Event]], size: int
) -> None:
    """With dropout, whose masks follow the rows; the last step of an epoch has fewer rows than there are processes."""
    with together(tmp_path, size, ROWS) as (shared, room):
        made, events = run(tmp_path, shared, micro_tokens=60)
        steps = len(curve(events))
        close(curve(events), curve(alone[1]))
        assert room.counts["sum"] == steps == shared.team.sums
    for ours, theirs in zip(made.state.history(), alone[0].state.history(), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_a_whole_model_is_that_of_one_process(tmp_path: Path) -> None:
    """And in the base's place every process has the base's own weights."""
    model = ModelSpec(model_folder(tmp_path / "model"))

    def whole(*_: Any) -> Session:
        return registry.open_session("reference", model, LoraSpec(1, 1.0, whole=True), OptimSpec(), 0)

    single, expected = run(tmp_path / "alone", whole())
    with together(tmp_path, 2, ROWS, wrap=whole) as (shared, _):
        _, events = run(tmp_path, shared)
        close(curve(events), curve(expected))
        for name, value in single.session.get_state().adapter.items():
            np.testing.assert_allclose(shared.get_state().adapter[name], value, atol=1e-4)
        tuned = shared.get_state().adapter
        with base_weights(shared):
            base = [*shared.score_all([ROWS_SCORED, ROWS_SCORED]), whole().score(ROWS_SCORED)]
            assert len({one.logprob.tobytes() for one in base if isinstance(one, Scores)}) == 1
        assert all((shared.get_state().adapter[name] == value).all() for name, value in tuned.items())


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    ends = []
    for name in ("first", "second"):
        with together(tmp_path / name, 3, ROWS) as (shared, _):
            run(tmp_path / name, shared)
            ends.append(shared.get_state())
    assert all((ends[0].adapter[name] == ends[1].adapter[name]).all() for name in ends[0].adapter)


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_stopped_on_two_resumes_on_one_and_on_three(tmp_path: Path, alone: Any, after: int) -> None:
    from finetune.disk.checkpoint import load_newest
    from finetune.errors import Interrupted

    asked = recipe(train={"epochs": 3, "batch_size": 6, "micro_tokens": 60})
    with together(tmp_path, 2, ROWS) as (shared, _):
        stopped = trainer(tmp_path, shared, asked, ROWS)
        with pytest.raises(Interrupted):
            for event in stopped.events():
                stopped.stopping = isinstance(event, StepDone) and event.step >= after
    saved, _ = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    for name, size in (("one", 1), ("three", 3)):
        if size == 1:
            rest = trainer(tmp_path, session(tmp_path / name), asked, ROWS)
            rest.restore(saved)
            done = curve(list(rest.events()))
        else:
            with together(tmp_path / name, size, ROWS) as (shared, _):
                rest = trainer(tmp_path / name, shared, asked, ROWS)
                rest.checkpoints = stopped.checkpoints
                rest.restore(saved)
                done = curve(list(rest.events()))
        close(done, curve(alone[1])[after:])


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_evaluation_is_that_of_one_process_to_the_byte(tmp_path: Path, task: str) -> None:
    rows = prepared(valid=71, task=task)

    def measured(live: Any) -> Any:
        how = {"name": "x", "micro_tokens": 64, "max_tokens": 6, "decode": lambda tokens: str(list(tokens))}
        return result_of(evaluate(live, rows, rows.valid, **how))

    one = measured(session(tmp_path / "model"))
    with together(tmp_path, 3, rows) as (shared, room):
        assert side_by_side(shared) == 3
        assert measured(shared).to_json() == one.to_json()
        assert room.counts["gather"] > 5


def test_answers_drawn_by_chance_are_those_of_one_process(tmp_path: Path) -> None:
    rows = dataset("x", 100, 5).examples
    how = (frozenset({2}), 5, "answers", 1.0, 7)
    one = result_of(write_tokens(session(tmp_path / "model"), rows, *how))
    with together(tmp_path, 2, ROWS) as (shared, _):
        assert result_of(write_tokens(shared, rows, *how)) == one


class Failing:
    """A session that raises in one of its steps, before or as it computes, or for a batch that it scores."""

    def __init__(self, inner: Any, step: int, error: Exception, score: int = 10**9) -> None:
        self.inner, self._bad, self._error, self._largest = inner, step, error, score

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "team":
            self.inner.team = value
        else:
            super().__setattr__(name, value)

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
        if self.inner.get_state().step == self._bad and self._error is not None:
            error, self._error = self._error, None  # type: ignore[assignment]
            raise error
        return self.inner.step(micro, lr)

    def score(self, batch: Batch) -> Scores:
        if batch.inputs.size > self._largest:
            raise OutOfMemory("small")
        return self.inner.score(batch)


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_lack_of_memory_in_one_splits_the_step_of_all(tmp_path: Path, alone: Any, lacking: int) -> None:
    def wrap(live: Session, rank: int) -> Any:
        return Failing(live, 4, OutOfMemory("full")) if rank == lacking else live

    with together(tmp_path, 3, ROWS, wrap) as (shared, _):
        made, events = run(tmp_path, shared, micro_tokens=60)
    assert [event.step for event in events if isinstance(event, MemorySplit)] == [4]
    assert made.state.micro_tokens < 60
    close(curve(events), curve(alone[1]))


def test_a_single_row_that_fits_nowhere_ends_the_run(tmp_path: Path) -> None:
    class Never(Failing):
        def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
            raise OutOfMemory("always")

    with (
        together(tmp_path, 2, ROWS, lambda live, rank: Never(live, 0, OutOfMemory()) if rank else live) as (shared, _),
        pytest.raises(MemoryExhausted),
    ):
        run(tmp_path, shared)


def test_a_batch_that_one_cannot_score_is_halved(tmp_path: Path) -> None:
    rows = prepared(valid=40)
    small = together(tmp_path, 2, rows, lambda live, rank: Failing(live, -1, OutOfMemory(), score=40) if rank else live)
    how: dict[str, Any] = {"name": "x", "micro_tokens": 200}
    one = result_of(evaluate(session(tmp_path / "model"), rows, rows.valid, **how))
    with small as (shared, _):
        assert result_of(evaluate(shared, rows, rows.valid, **how)).loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_number_that_is_not_finite_in_one_stops_all(tmp_path: Path, bad: int) -> None:
    """The step is not applied, in any process: the numbers are those of the step before."""

    class Poison(Failing):
        def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
            if self.inner.get_state().step == 5:
                name, value = next(iter(self.inner._embed.items()))
                self.inner._embed[name] = value * np.float32(np.nan)
            return self.inner.step(micro, lr)

    def wrap(live: Session, rank: int) -> Any:
        return Poison(live, -1, NonFinite()) if rank == bad else live

    with together(tmp_path, 2, ROWS, wrap) as (shared, _):
        with pytest.raises(Diverged, match="step 6"):
            run(tmp_path, shared)
        assert shared.get_state().step == 5
        shared.set_state(shared.get_state())  # compares the hashes


def test_other_numbers_in_one_are_found_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "CHECK_EVERY", 2)

    class Wrong(Failing):
        def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
            done = self.inner.step(micro, lr)
            if self.inner.get_state().step == 3:
                next(iter(self.inner._adapter.values()))[0, 0] += np.float32(1e-6)
            return done

    with (
        together(tmp_path, 2, ROWS, lambda live, rank: Wrong(live, -1, OutOfMemory()) if rank else live) as (shared, _),
        pytest.raises(Apart, match="after step 4 process 1 and process 0 hold different numbers"),
    ):
        run(tmp_path, shared)


def test_other_rows_in_one_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit import threads

    fewer = (*ROWS.train.examples[:-1], dataset("other", 9, 9).examples[6])
    monkeypatch.setattr(threads, "share_of", lambda rows, *rest: share(fewer, *rest))
    from finetune.training.step_shares import share_of as share

    with together(tmp_path, 2, ROWS) as (shared, _), pytest.raises(Apart, match="supervised tokens together"):
        run(tmp_path, shared, epochs=5)


def test_a_signal_to_any_process_is_heard_by_the_first(tmp_path: Path) -> None:
    with together(tmp_path, 3, ROWS, stop=lambda rank: signal.SIGTERM if rank == 2 else 0) as (shared, _):
        run(tmp_path, shared, epochs=1)
        assert shared.team.heard == signal.SIGTERM


def test_shares_hold_every_row_once_and_about_as_many_tokens() -> None:
    lengths = [len(example) for example in dataset("x", 16, 3).examples]
    for size in (2, 3, 7, 40):
        shares = balanced(lengths, size)
        assert sorted(row for rows in shares for row in rows) == list(range(16))
        totals = [sum(lengths[row] for row in rows) for rows in shares]
        assert max(totals) - min(totals) <= max(lengths)


def test_the_shares_of_a_step_have_the_numbers_of_the_whole_step() -> None:
    examples = dataset("x", 11, 4).examples
    rows = [row for rank in range(3) for one in micro_batches(examples, 50, True, rank, 3) for row in one.rows]
    assert sorted(rows) == list(range(11))


def test_messages_hold_batches_as_they_are() -> None:
    (batch, *_) = micro_batches(dataset("x", 5, 4).examples, 500)
    header, arrays = batch_arrays(batch, 1)
    told, parts = unpack(pack({"b": header}, arrays))
    again = batch_of(told["b"], parts, 1)
    assert (again.inputs == batch.inputs).all() and (again.weights == batch.weights).all()
    assert (again.rows, again.rowless, again.prefix_of) == (batch.rows, batch.rowless, batch.prefix_of)
    assert unpack(pack({"do": "end"})) == ({"do": "end"}, {})


def test_rows_are_read_as_they_were_written_and_refused_where_they_were_not(tmp_path: Path) -> None:
    rows = dataset("x", 9, 1).examples
    digest = write_rows(tmp_path, rows)
    again = read_rows(content_of(tmp_path) or b"", digest)
    assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in rows]
    assert [one.weights.tolist() for one in again] == [one.weights.tolist() for one in rows]
    content = bytearray((tmp_path / NAME).read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(content[:-1]), b""):
        with pytest.raises(Incompatible, match=NAME):
            read_rows(damaged, digest)
    remove_rows(tmp_path)
    remove_rows(tmp_path)
    assert content_of(tmp_path) is None
