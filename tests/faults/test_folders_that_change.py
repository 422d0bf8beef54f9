"""A run's folder, its metrics or its model moved, deleted, cut or replaced under a run: one sentence, 6 or 8."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import supervisor
from finetune.disk import atomic
from finetune.disk.atomic import new_folder, write_file
from finetune.disk.lock import locked
from finetune.disk.metrics import MetricsFile
from finetune.disk.run_folder import RunFolder, create
from finetune.disk.weight_files import cut_short
from finetune.errors import DiskError, FinetuneError, Incompatible
from finetune.events import Event, Progress, StepDone, Validated
from finetune.recipe.load import check_recipe
from finetune.run import Run
from finetune.training.job import Job
from tests.end_to_end.command import reviews
from tests.unit.test_supervisor import child, kill
from tests.unit.toy_run import load_job

Change = Callable[[RunFolder, Path], Any]  # (the run, the model)


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Job:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for name, first, count in (("train", 0, 18), ("test", 100, 9)):
        lines = "".join(json.dumps(row) + "\n" for row in reviews(first, count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return load_job(
        check_recipe(
            {
                "model": {"path": str(model)},
                "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
                "lora": {"rank": 2, "targets": ["q_proj"]},
                "train": {"steps": 6, "batch_size": 4, "checkpoint_every": 2},
                "evaluate": {"every": 3},
                "backend": "reference",
                "output": str(tmp_path / "runs"),
            }
        )
    )


def ends(job: Job, change: Change, when: Callable[[Event], bool]) -> FinetuneError:
    """How a run ends under which something was changed after the event."""
    run, changed = create(job.recipe, "toy"), False
    with pytest.raises(FinetuneError) as caught, locked(run.path, os.getpid()) as lock:
        for event in Run(job, run, lock).events():
            if not changed and when(event):
                change(run, job.folder.path)
                changed = True
    assert changed
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def after_a_step(event: Event) -> bool:
    return isinstance(event, StepDone) and event.step == 2


MOMENTS = {
    "while the base is evaluated": lambda event: isinstance(event, Progress) and event.what.startswith("base"),
    "before the first step": lambda event: isinstance(event, Validated),
    "after a step": after_a_step,
    "while the tuned model is evaluated": lambda event: isinstance(event, Progress) and event.what.startswith("tuned"),
}
OF_THE_RUN: dict[str, Change] = {
    "moved": lambda run, model: run.path.rename(run.path.with_name("elsewhere")),
    "deleted": lambda run, model: shutil.rmtree(run.path),
    "replaced": lambda run, model: shutil.copytree(run.path.rename(run.path.with_name("elsewhere")), run.path),
    "a file instead": lambda run, model: (shutil.rmtree(run.path), run.path.write_text("")),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", OF_THE_RUN)
def test_the_runs_folder(job: Job, change: str, moment: str) -> None:
    found = ends(job, OF_THE_RUN[change], MOMENTS[moment])
    assert found.exit_code == 6
    assert "toy-" in str(found)
    assert not list(Path(job.recipe.output).glob("toy-*/report.json")), "nothing is written where the run was"


METRICS: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_text(""),
    "cut": lambda file: os.truncate(file, 10),
    "replaced": lambda file: (file.rename(file.with_name("old")), shutil.copy(file.with_name("old"), file)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "written by another": lambda file: file.write_text(file.read_text() + "{}\n"),
}


@pytest.mark.parametrize("change", METRICS)
def test_its_metrics(job: Job, change: str) -> None:
    found = ends(job, lambda run, model: METRICS[change](run.metrics), after_a_step)
    assert found.exit_code == 6
    assert "metrics.jsonl" in str(found)


def overwritten(model: Path) -> None:
    """Other weights of the same size, in the very same file."""
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-400:] = bytes(400)
    with file.open("r+b") as opened:
        opened.write(data)


MODEL: dict[str, Callable[[Path], Any]] = {
    "deleted": shutil.rmtree,
    "moved": lambda model: model.rename(model.with_name("elsewhere")),
    "cut": lambda model: os.truncate(model / "model.safetensors", 5000),
    "overwritten": overwritten,
    "without weights": lambda model: (model / "model.safetensors").unlink(),
    "without a config": lambda model: (model / "config.json").unlink(),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", MODEL)
def test_its_model(job: Job, change: str, moment: str) -> None:
    time.sleep(0.002)  # a file system's clock ticks
    found = ends(job, lambda run, model: MODEL[change](model), MOMENTS[moment])
    assert isinstance(found, Incompatible)
    assert str(job.folder.path) in str(found)
    assert not list(Path(job.recipe.output).glob("*/report.json"))


@pytest.mark.parametrize("change", MODEL)
def test_its_model_before_it_is_loaded(job: Job, change: str) -> None:
    pytest.importorskip("torch")
    time.sleep(0.002)
    MODEL[change](job.folder.path)
    with pytest.raises((Incompatible, Exception)) as caught:
        job.session("torch")
        job.check_model()
    assert isinstance(caught.value, Incompatible)


def test_cut_weights_under_their_mapping_are_said_as_what_they_are(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    announced = f"child.announce_model(Path({str(model)!r}))\n"
    assert cut_short(model) == []
    assert supervisor.run(child(announced + kill(signal.SIGBUS))) == 1
    assert "crashed in native code (SIGBUS" in capfd.readouterr().err, "no file of the model is cut"
    os.truncate(model / "model.safetensors", 5000)
    read = f"""
import mmap
with open({str(model / "model.safetensors")!r}, "r+b") as file:
    os.truncate(file.fileno(), 10 * mmap.PAGESIZE); mapped = mmap.mmap(file.fileno(), 0)
    os.truncate(file.fileno(), 5000); mapped[9 * mmap.PAGESIZE]
"""
    assert supervisor.run(child(announced + read)) == 8
    said = capfd.readouterr().err
    assert f"a mapped file was cut short while in use: {model / 'model.safetensors'}" in said


# How a page that is gone may be read: by Python, with numpy, without Python's lock, and in another thread.
FAULTS = {
    "python": "mapped[9 * mmap.PAGESIZE]",
    "numpy": "import numpy; numpy.frombuffer(mapped, numpy.uint8).sum()",
    "native": "ctypes.memmove(room, start, 10 * mmap.PAGESIZE)",
    "thread": "one = threading.Thread(target=ctypes.memmove, args=(room, start, 10 * mmap.PAGESIZE)); "
    "one.start(); one.join()",
}


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="signals as POSIX has them")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_command_without_a_supervisor_says_it_too(tmp_path: Path, tiny_model: Path, fault: str) -> None:
    file = shutil.copytree(tiny_model, tmp_path / "model") / "model.safetensors"
    code = f"""
import ctypes, mmap, os, pathlib, threading
from finetune.crashes import explain_cut_files
from finetune.supervisor import announce_model
file = pathlib.Path({str(file)!r})
explain_cut_files()
announce_model(file.parent)
with file.open("r+b") as opened:
    os.truncate(file, 10 * mmap.PAGESIZE); mapped = mmap.mmap(opened.fileno(), 0)
    room, start = ctypes.create_string_buffer(len(mapped)), (ctypes.c_char * len(mapped)).from_buffer(mapped)
    os.truncate(file, 5000)
    {FAULTS[fault]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 8
    assert done.stderr.startswith(f"\nfinetune: a mapped file was cut short while in use: {file} (SIGBUS)")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="signals as POSIX has them")
def test_another_bus_error_ends_a_command_as_it_always_did(tmp_path: Path, tiny_model: Path) -> None:
    code = f"""
import os, pathlib
from finetune.crashes import explain_cut_files
from finetune.supervisor import announce_model
explain_cut_files(); announce_model(pathlib.Path({str(tiny_model)!r}))
for _ in range(2): os.kill(os.getpid(), {int(getattr(signal, "SIGBUS", 0))})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("left", [0, 7, 8, 100])
def test_a_header_that_is_cut_counts_too(tmp_path: Path, tiny_model: Path, left: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((tiny_model / "model.safetensors").read_bytes()[:left])
    assert cut_short(tmp_path) == [file]


# What a disk may answer


@pytest.mark.parametrize("code", [errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_folder_that_has_no_flush_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(code, os.strerror(code))

    if not Path("/proc/self/fd").exists():
        pytest.skip("Linux says what a handle is of")
    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "new" / "one", "x")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "two").write_text("y")
    assert (tmp_path / "folder" / "two").read_text() == "y"


def test_a_folder_whose_flush_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError):
        atomic.make_folder(tmp_path / "new")


@pytest.mark.parametrize("code", [27, 28, 30, 122])
def test_a_library_in_rust_says_it_in_words(tmp_path: Path, code: int) -> None:
    """As tokenizers does when it saves a tokenizer to a full disk."""
    with pytest.raises(DiskError, match=os.strerror(code)), new_folder(tmp_path / "folder"):
        raise Exception(f"{os.strerror(code)} (os error {code})")
    assert list(tmp_path.iterdir()) == []


def test_metrics_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "run" / "metrics.jsonl") as metrics:
        metrics.record(StepDone(1, 0.1, 1.0, 1.0, 1e-3, 4, 4, 0.1, 1))
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(DiskError, match=r"metrics\.jsonl"):
            metrics.record(StepDone(2, 0.2, 1.0, 1.0, 1e-3, 4, 4, 0.1, 1))
