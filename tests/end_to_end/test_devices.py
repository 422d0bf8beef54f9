"""`--devices`: two processes of the command line, each backend's own launcher between them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from backends import registry, table
from finetune.disk.run_folder import create
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work, ended, losses, newest, same, steps_done, stopped, wait_for
from tests.unit.toy_run import load_job, run_to_report

RECIPE = """\
data: {train: train.jsonl, test: test.jsonl}
lora: {rank: 2, alpha: 4, dropout: 0.1, targets: [q_proj, down_proj]}
train: {steps: 6, batch_size: 4, micro_tokens: 160, learning_rate: 1e-2, checkpoint_every: 2}
evaluate: {every: 3, forgetting: false}
"""
LONG = RECIPE.replace("steps: 6", "steps: 400").replace("every: 3", "every: 100")
JOINED = [name for name, row in table.BACKENDS.items() if row.launcher]


@pytest.fixture(params=JOINED)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := registry.probe(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def left_behind(work: Work) -> list[int]:
    """Processes that work in the folder, such as those of a run."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        here = process.info["cwd"] and Path(process.info["cwd"]) == work.folder.resolve()
        if here and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def trains(process: psutil.Process) -> bool:
    """No supervisor, which has children, and not the process that renders chat templates, which ends no run."""
    return not process.children() and "template_child" not in " ".join(process.cmdline())


def alone(work: Work, backend: str, recipe: str) -> Path:
    """The same run in this process."""
    job = load_job(load_recipe(work.folder / recipe, ["output=" + str(work.folder / "alone")]), backend)
    folder = create(job.recipe, "alone")
    run_to_report(job, folder)
    return folder.path


def close(run: Path, other: Path) -> None:
    ours, theirs = losses(run), losses(other)
    assert [one[0] for one in ours] == [one[0] for one in theirs]
    np.testing.assert_allclose([one[1] for one in ours], [one[1] for one in theirs], rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.slow)], indirect=True)
def test_two_processes_make_the_run_of_one(work: Work, backend: str) -> None:
    recipe = work.recipe(RECIPE)
    answer = work.finetune("train", recipe, "--backend", backend, "--devices", "2").good()
    (run,) = work.runs()
    other = alone(work, backend, recipe)
    close(run, other)
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert "accuracy" in answer.out and answer.err.count("run runs/") == 1
    assert not left_behind(work)


@pytest.mark.slow
def test_a_stopped_run_resumes_on_one_process(work: Work, backend: str) -> None:
    recipe = work.recipe(LONG)
    process = work.start("train", recipe, "--backend", backend, "--devices", "2")
    answer = stopped(work, process, newest(work, 0), 20, signal.SIGINT)
    assert answer.code == 130 and "resume with: finetune resume" in answer.err, answer.err
    assert not left_behind(work)
    (run,) = work.runs()
    done = steps_done(run)
    assert 20 <= done < 400
    work.finetune("resume", str(run), "--backend", backend).good()
    close(run, alone(work, backend, recipe))


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(2))
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bytes(work: Work, backend: str, kill: int) -> None:
    recipe, draw = work.recipe(LONG), random.Random(kill)
    arguments = ["--backend", backend, "--devices", "2"]
    work.finetune("train", recipe, *arguments).good()
    (whole,) = work.runs()
    process = work.start("train", recipe, *arguments)
    wait_for(lambda: (run := newest(work, 1)()) is not None and steps_done(run) >= draw.randrange(10, 200), process)
    training = sorted(one for one in left_behind(work) if trains(psutil.Process(one)) and one != process.pid)
    began = time.monotonic()
    os.kill(draw.choice(training), signal.SIGKILL)
    answer = ended(process)
    assert answer.code == 1 and "SIGKILL" in answer.err and "finetune resume" in answer.err, answer.err
    assert time.monotonic() - began < 30
    assert not left_behind(work)
    run = work.runs()[-1]
    work.finetune("resume", str(run), *arguments).good()
    same(run, whole)
