"""One process at a time works on a run; the lock is the system's, and ends with whoever holds it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.disk import lock as locks
from finetune.disk.lock import NAME, locked
from finetune.errors import DiskError, Incompatible
from tests.end_to_end.command import ROOT, Work, ended, losses, newest, steps_done, stopped, wait_for
from tests.end_to_end.test_run import RECIPE
from tests.unit.test_wrong_resume import finetune

HOLDS = """
import sys, time
from pathlib import Path
from finetune.disk.lock import locked
with locked(Path(sys.argv[1]), 4711):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_who_has_the_run_is_named_and_its_end_frees_it(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with pytest.raises(Incompatible) as caught, locked(tmp_path, 1):
        pass
    assert caught.value.exit_code == 8
    for part in ("process 4711", f"training in {holder.pid}", "since 20", str(tmp_path)):
        assert part in str(caught.value)
    monkeypatch.setattr(locks, "PATIENCE", 30.0)
    holder.send_signal(signal.SIGKILL)
    with locked(tmp_path, 1):
        assert (tmp_path / NAME).exists(), "what the killed process left behind locks nothing"
    assert not (tmp_path / NAME).exists(), "a run that ended leaves no trace of it"


@pytest.mark.parametrize("left", ["", "{", '{"process": 1}', "[]", '{"process":"\\u001b[31m"}'])
def test_a_file_alone_locks_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / NAME).write_text(left)
    with locked(tmp_path, 1) as lock:
        lock.check()


@pytest.mark.skipif(os.name != "posix", reason="fcntl")
def test_a_holder_who_says_nothing_is_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with locked(tmp_path, 1), pytest.raises(Incompatible, match="another process works on this run"):
        (tmp_path / NAME).write_text("?")
        with locked(tmp_path, 2):
            pass


@pytest.mark.skipif(os.name != "posix", reason="fcntl")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, 1) as lock, locked(tmp_path, 2):
        assert "no locks" in (lock.note or "")
        lock.check()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("odd", ["a link", "a pipe", "a folder"])
def test_what_is_no_file_is_refused_and_not_written_to(tmp_path: Path, odd: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    run = tmp_path / "run"
    run.mkdir()
    if odd == "a link":
        (run / NAME).symlink_to(outside)
    else:
        os.mkfifo(run / NAME) if odd == "a pipe" else (run / NAME).mkdir()
    with pytest.raises((DiskError, Incompatible), match=NAME), locked(run, 1):
        pass
    assert outside.read_text() == "theirs"


@pytest.mark.slow
def test_a_second_resume_is_refused_and_the_first_knows_nothing_of_it(work: Work) -> None:
    arguments = ("train", work.recipe(RECIPE), "--backend", "reference", "train.steps=9000")
    process, making = work.start(*arguments), newest(work, 0)
    wait_for(lambda: (run := making()) is not None and steps_done(run) > 2, process)
    run = making()
    assert run is not None
    message = work.finetune("resume", str(run)).failed(8)
    assert f"process {process.pid} " in message
    process.send_signal(signal.SIGINT)
    answer = ended(process)
    assert (answer.code, "Traceback" in answer.err) == (130, False), answer
    steps = [one[0] for one in losses(run)]
    assert steps == list(range(1, len(steps) + 1)), "each step once"


def test_a_run_can_be_read_while_another_process_works_on_it(work: Work) -> None:
    """What eval writes is one file that it replaces at once, and that no run reads."""
    work.recipe(RECIPE)
    quick = ["train.steps=2", "--backend", "reference"]
    finetune(work, "train", "recipe.yaml", *quick).good()
    (run,) = work.runs()
    with locked(run, 1):
        finetune(work, "eval", str(run)).good()
        finetune(work, "generate", str(run), "a film", "--max-tokens", "2").good()
        assert "is finished" in finetune(work, "resume", str(run)).good().out
    assert (run / "eval.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the supervisor", "the child"])
def test_a_killed_process_frees_its_run(work: Work, who: str) -> None:
    import psutil

    process, making = work.start("train", work.recipe(RECIPE), "--backend", "reference"), newest(work, 0)
    if who == "the supervisor":
        stopped(work, process, making, 4, signal.SIGKILL)
    else:
        wait_for(lambda: (run := making()) is not None and (run / "checkpoints").exists(), process)
        psutil.Process(process.pid).children()[0].kill()
        ended(process)
    work.finetune("resume", str(making())).good()
