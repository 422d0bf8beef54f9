"""The power fails: what was not flushed is lost, torn or reordered. No checkpoint that `save` promised is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune.disk import atomic
from finetune.disk.checkpoint import Checkpoint, load_newest, save
from finetune.disk.metrics import MetricsFile
from finetune.errors import Incompatible
from tests.faults.cases import amounts
from tests.faults.disk import Recorder, states
from tests.faults.toy import assert_same_end, run_to_the_end
from tests.unit.test_checkpoint import assert_same, checkpoint, exact
from tests.unit.toy_run import session


def record_saves(root: Path, patch: pytest.MonkeyPatch) -> tuple[Recorder, list[Checkpoint]]:
    """Six saves, one of them over a checkpoint of the same step; the promise is the number of saves done."""
    root.mkdir()
    written = [checkpoint(step, seed=number, width=90) for number, step in enumerate((0, 1, 2, 2, 3, 7))]
    recorder = Recorder(root)
    with recorder.recording(patch):
        for number, one in enumerate(written):
            save(root / "run" / "checkpoints", one)
            recorder.promise(number)
    return recorder, written


def check_saves(recorder: Recorder, written: list[Checkpoint], count: int, folder: Path) -> None:
    """Nothing but what was written comes back, and not less than was promised."""
    folder.mkdir()
    for number, state in enumerate(states(recorder, count)):
        place = folder / str(number)
        state.write(place)
        found, _ = load_newest(place / "run" / "checkpoints")
        least = state.promised[-1] if state.promised else -1
        if found is None:
            assert least == -1, f"state {number}: save {least} was promised, and nothing is left"
        else:
            which = [at for at, one in enumerate(written) if exact(one.state.adapter) == exact(found.state.adapter)]
            assert which, f"state {number}: a checkpoint that was never written"
            assert_same(found, written[which[0]])
            assert which[0] >= least, f"state {number}: save {least} was promised, and {which[0]} came back"
        again = checkpoint(9)
        save(place / "run" / "checkpoints", again)
        assert_same(load_newest(place / "run" / "checkpoints")[0], again)
        shutil.rmtree(place)


@pytest.mark.parametrize("count", amounts(250, 5000))
def test_no_promised_checkpoint_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    recorder, written = record_saves(tmp_path / "disk", monkeypatch)
    assert 100 < len(recorder.log) < 250, "every moment should come to be tried"
    check_saves(recorder, written, count, tmp_path / "states")


def record_run(root: Path, patch: pytest.MonkeyPatch) -> Recorder:
    """A toy run with its metrics; nothing is promised but that it can go on."""
    (root / "run").mkdir(parents=True)
    live = session(root / "model")
    recorder = Recorder(root / "run")
    with recorder.recording(patch):
        run_to_the_end(root / "run", live)
    return recorder


def check_run(recorder: Recorder, whole: Path, count: int, folder: Path) -> None:
    """Gone on with from any state, it comes to the same end."""
    folder.mkdir()
    for number, state in enumerate(states(recorder, count)):
        state.write(folder / str(number))
        try:
            run_to_the_end(folder / str(number))
            assert_same_end(folder / str(number), whole)
        except Incompatible as refused:
            assert "metrics.jsonl" in str(refused), "zeros in the midst of a file: said, with the line"
        shutil.rmtree(folder / str(number))


@pytest.mark.parametrize("count", amounts(25, 500))
def test_a_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    recorder = record_run(tmp_path / "disk", monkeypatch)
    check_run(recorder, run_to_the_end(tmp_path / "whole"), count, tmp_path / "states")


# Faults that must be found


@pytest.mark.parametrize("function", ["_sync_tree", "sync_directory", "_sync"])
def test_a_writer_that_does_not_flush_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(atomic, function, lambda *args: None)
    recorder, written = record_saves(tmp_path / "disk", monkeypatch)
    with pytest.raises(AssertionError, match="was promised"):
        check_saves(recorder, written, 400, tmp_path / "states")


def test_a_folder_made_and_not_flushed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "make_folder", lambda path: path.mkdir(parents=True, exist_ok=True))
    recorder, written = record_saves(tmp_path / "disk", monkeypatch)
    with pytest.raises(AssertionError, match="was promised, and nothing is left"):
        check_saves(recorder, written, 400, tmp_path / "states")


def test_metrics_that_are_not_flushed_before_the_checkpoint_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsFile, "sync", lambda metrics: None)
    recorder = record_run(tmp_path / "disk", monkeypatch)
    with pytest.raises(AssertionError, match="differ"):
        check_run(recorder, run_to_the_end(tmp_path / "whole"), 300, tmp_path / "states")
