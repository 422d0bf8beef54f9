"""SIGKILL at random moments, with dropout, accumulation and several epochs: gone on with, the same to the byte.

Toy runs on the reference backend, as processes of their own; and whole runs of the command line on each backend.
That every backend goes on after one SIGINT, one SIGTERM and one SIGKILL is in `end_to_end/test_run.py`.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest

from backends.interface import TrainState
from finetune.data.collate import micro_batches, step_indices
from finetune.disk.checkpoint import Checkpoint
from finetune.training.loop import Trainer
from tests.end_to_end.command import ROOT, Work, ended, losses, newest, same, steps_done, wait_for
from tests.end_to_end.test_run import RECIPE
from tests.faults.cases import cases
from tests.faults.toy import ACCUMULATING, assert_same_end, run_to_the_end, start_or_resume
from tests.unit.toy_run import prepared, recipe

# How many kills of whole runs on each backend, beside the 26 of toy runs.
KILLS = {"reference": 4, "torch": 10, "mlx": 10}
METHODS = {"lora": RECIPE, "full": re.sub(r"lora: .*\n", "method: full\n", RECIPE).replace("1e-2", "1e-3")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A toy run that nobody stopped, in a process of its own, and how long it took in seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    assert toy(folder).wait(timeout=120) == 0
    return folder, time.monotonic() - began


def toy(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.faults.toy", str(run)], cwd=ROOT)


def test_the_toy_run_accumulates() -> None:
    rows, asked = prepared().train.examples, recipe(train=ACCUMULATING)
    first = [rows[i] for i in step_indices(len(rows), asked.train.batch_size, asked.seed, 0)]
    assert len(micro_batches(first, asked.train.micro_tokens)) > 1


@pytest.mark.parametrize("case", cases(3, 26))
def test_toy_runs_killed_at_random_moments(tmp_path: Path, whole: tuple[Path, float], case: int) -> None:
    """Killed once or twice, at a moment after it began to write."""
    rng = random.Random(case)
    for _ in range(rng.choice((1, 2))):
        process = toy(tmp_path / "run")
        while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.wait()
    assert_same_end(run_to_the_end(tmp_path / "run"), whole[0])


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(
    make_work: Callable[[], Work], backend: str, request: pytest.FixtureRequest
) -> tuple[Work, str, Path, float]:
    """A run that nobody stopped, of an adapter or of the whole model, and how long it took in seconds."""
    if request.param == "full" and backend == "reference":
        pytest.skip("the reference trains a whole model in the conformance tests")
    work = make_work()
    began = time.monotonic()
    work.finetune("train", work.recipe(METHODS[request.param]), "--backend", backend).good()
    return work, backend, work.runs()[0], time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("case", range(max(KILLS.values())))
def test_whole_runs_killed_at_random_moments(trained: tuple[Work, str, Path, float], case: int) -> None:
    """The supervisor is killed, or its child, at any time from the start of the run's folder to the report."""
    work, backend, run, seconds = trained
    if case >= KILLS[backend]:
        pytest.skip(f"{KILLS[backend]} kills on this backend")
    rng, making = random.Random(case), newest(work, len(work.runs()))
    process = work.start("train", "recipe.yaml", "--backend", backend)
    if case % 2:
        lines = rng.randrange(len((run / "metrics.jsonl").read_text().splitlines()))
        wait_for(lambda: (found := making()) is not None and steps_done(found) >= min(lines, 39), process)
    else:
        wait_for(lambda: making() is not None, process)
        time.sleep(rng.random() * seconds * 0.7)
    if process.poll() is None:
        psutil.Process(process.pid).children()[0].kill() if rng.random() < 0.5 else process.kill()
    ended(process)
    again = making()
    assert again is not None
    work.finetune("resume", str(again), "--backend", backend).good()
    same(again, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 9, 7))])
def test_a_native_crash_loses_no_run(work: Work, number: int) -> None:
    """The training process is ended by a signal: the supervisor says what is left, and the run goes on."""
    command = ("train", work.recipe(RECIPE), "--backend", "reference", "train.steps=20")
    process, making = work.start(*command), newest(work, 0)

    def crash() -> bool:
        found = making()
        return found is not None and (found / "checkpoints" / "step-00000006").exists()

    wait_for(crash, process)
    psutil.Process(process.pid).children()[0].send_signal(number)
    answer = ended(process)
    (run,) = work.runs()
    message = answer.failed(1)
    assert signal.Signals(number).name in message
    assert f"Resume it with: finetune resume {run.relative_to(work.folder)}" in message
    assert "last intact checkpoint is of step" in message
    work.finetune("resume", str(run)).good()
    assert len(losses(run)) == 20


# Faults that must be found


def _without_moments(trainer: Trainer, saved: Checkpoint, real: Callable[[Trainer, Checkpoint], None]) -> None:
    empty: Mapping[str, object] = {}
    real(trainer, replace(saved, state=TrainState(saved.state.step, saved.state.adapter, empty)))  # type: ignore[arg-type]


def _with_a_step_more(trainer: Trainer, saved: Checkpoint, real: Callable[[Trainer, Checkpoint], None]) -> None:
    real(trainer, replace(saved, state=TrainState(saved.state.step + 1, saved.state.adapter, saved.state.moments)))


def _without_the_loops_state(trainer: Trainer, saved: Checkpoint, real: Callable[[Trainer, Checkpoint], None]) -> None:
    trainer.session.set_state(saved.state)


@pytest.mark.parametrize("fault", [_without_moments, _with_a_step_more, _without_the_loops_state])
def test_a_resume_that_restores_less_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, float], fault: Callable[..., None]
) -> None:
    list(islice(start_or_resume(tmp_path / "run"), 9))  # to the checkpoint after step 3, and a step more
    real = Trainer.restore
    monkeypatch.setattr(Trainer, "restore", lambda trainer, saved: fault(trainer, saved, real))
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_same_end(run_to_the_end(tmp_path / "run"), whole[0])


def test_without_a_fault_it_is_the_same(tmp_path: Path, whole: tuple[Path, float]) -> None:
    list(islice(start_or_resume(tmp_path / "run"), 9))
    assert_same_end(run_to_the_end(tmp_path / "run"), whole[0])
