"""The supervisor: how a child may end, what is said of it, signals handed on, and that it is light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import crashes, supervisor
from finetune.errors import ExitCode
from tests.unit.test_checkpoint import checkpoint, save

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def child(code: str) -> list[str]:
    """A command that is supervised: `child` is the module."""
    start = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    begin = "from finetune import supervisor as child\nchild._PATIENCE = 1\nchild.supervise()\n"
    return [sys.executable, "-c", start + begin + code]


def kill(number: int) -> str:
    return f"os.kill(os.getpid(), {int(number)}); time.sleep(60)"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with two checkpoints, the newer of them broken."""
    for step in (3, 6):
        newest = save(tmp_path / "my run" / "checkpoints", checkpoint(step))
    (newest / "loop.json").write_text("{}")
    (tmp_path / "my run" / "recipe.yaml").touch()
    return tmp_path / "my run"


@pytest.mark.parametrize("code", sorted(set(ExitCode) | {77}))
def test_an_exit_code_is_handed_on(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervisor.run(child(f"sys.exit({code})")) == code
    said = capfd.readouterr().err
    assert said == (f"exit code {code}: {ExitCode(code).meaning}.\n" if code in (1, 4, 5, 6) else "")


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.abort()", 1, "crashed in native code (SIGABRT"),
        (kill(signal.SIGSEGV), 1, "crashed in native code (SIGSEGV"),
        (kill(signal.SIGBUS), 1, "crashed in native code (SIGBUS"),
        (f"signal.signal(25, signal.SIG_DFL); {kill(25)}", 6, "a file grew beyond what `ulimit -f` allows"),
        (kill(signal.SIGILL), 1, "crashed in native code (SIGILL"),
        (kill(signal.SIGKILL), 1, "another process killed the training process (SIGKILL)"),
        (f"signal.signal(15, signal.SIG_DFL); {kill(signal.SIGTERM)}", 143, "ended by SIGTERM"),
        (f"signal.signal(2, signal.SIG_DFL); {kill(signal.SIGINT)}", 130, "ended by SIGINT"),
        ("sys.exit(5)", 5, "exit code 5: out of memory"),
        ("1 / 0", 1, "exit code 1: a crash"),
    ],
)
def test_a_child_that_crashes_loses_no_run(
    run_folder: Path, capfd: pytest.CaptureFixture[str], end: str, code: int, words: str
) -> None:
    assert supervisor.run(child(f"child.announce_run(Path({str(run_folder)!r}))\n{end}")) == code
    said = capfd.readouterr().err
    assert words in said
    assert "last intact checkpoint is of step 3" in said, "that of step 6 is broken"
    assert f"finetune resume '{run_folder}'" in said
    assert (run_folder / "checkpoints" / "step-00000006").exists(), "it only looks"


def test_a_crash_names_what_was_read(capfd: pytest.CaptureFixture[str]) -> None:
    inside = "with child.reading('a b/tokenizer.json'):\n    "
    assert supervisor.run(child(f"{inside}os.abort()")) == 8
    assert "(SIGABRT, Aborted) while it read a b/tokenizer.json; exit code 8" in capfd.readouterr().err
    assert supervisor.run(child(f"{inside}pass\nos.abort()")) == 1
    assert "while it read" not in capfd.readouterr().err


def test_after_divergence_there_is_no_going_on(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervisor.run(child(f"child.announce_run(Path({str(run_folder)!r})); sys.exit(4)")) == 4
    said = capfd.readouterr().err
    assert "step 3" in said
    assert "resume" not in said


def test_a_finished_run_needs_no_going_on(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run_folder / "report.json").touch()
    supervisor.run(child(f"child.announce_run(Path({str(run_folder)!r})); os.abort()"))
    assert "The run is finished; its report is" in capfd.readouterr().err


def test_a_run_without_a_checkpoint_is_named_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    supervisor.run(child(f"child.announce_run(Path({str(tmp_path)!r})); os.abort()"))
    assert "it has no checkpoint yet. Resume it with: finetune resume" in capfd.readouterr().err


def test_killed_for_memory(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    counts = iter([7, 8])
    monkeypatch.setattr(crashes, "oom_kills", lambda: next(counts))
    assert supervisor.run(child(kill(signal.SIGKILL))) == 5
    assert "killed because memory ran out (by the system's out-of-memory killer" in capfd.readouterr().err
    monkeypatch.setattr(crashes, "oom_kills", lambda: 0)
    monkeypatch.setattr(crashes, "_SHORT", 0.0)
    assert supervisor.run(child(kill(signal.SIGKILL))) == 5
    assert "killed because memory ran out (it held" in capfd.readouterr().err


STOPS = (
    "got = []\n"
    "for n in (2, 15): signal.signal(n, lambda n, f: got.append(n))\n"
    "print('ready', flush=True)\n"
    "while len(got) < int(sys.argv[1]): time.sleep(0.01)\n"
    "print(got, flush=True)\n"
    "sys.exit(128 + got[0])"
)


def supervised(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, in a group of its own, once its child is ready."""
    command = child(code) + list(arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("whole_group", [False, True], ids=["alone", "the terminal's whole group"])
@pytest.mark.parametrize("numbers", [[2], [15], [2, 2], [15, 2]])
def test_every_signal_reaches_the_child_once(numbers: list[int], whole_group: bool) -> None:
    process = supervised(STOPS, str(len(numbers)))
    for number in numbers:
        (os.killpg if whole_group else os.kill)(process.pid, number)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=30)
    assert out == f"{numbers}\n"
    assert process.returncode == 128 + numbers[0]


def test_a_child_that_hangs_in_native_code_is_killed_soon_after_the_second_interrupt() -> None:
    hangs = "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\nprint('ready', flush=True); time.sleep(60)"
    process = supervised(hangs)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_killed_supervisor_takes_its_child_along() -> None:
    process = supervised("print('ready', flush=True); time.sleep(60)")
    process.kill()
    began = time.monotonic()
    process.communicate(timeout=30)  # to the end of the child's standard output
    assert time.monotonic() - began < 10


def test_stopped_and_continued_the_child_does_so_too() -> None:
    psutil = pytest.importorskip("psutil")
    process = supervised(STOPS, "1")
    outer = psutil.Process(process.pid)
    (inner,) = outer.children()
    for number, expected in ((signal.SIGTSTP, True), (signal.SIGCONT, False)):
        process.send_signal(number)
        until = time.monotonic() + 20
        while {one.status() == psutil.STATUS_STOPPED for one in (outer, inner)} != {expected}:
            assert time.monotonic() < until
            time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_mac_stays_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, log = tmp_path / "caffeinate", tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$@" > {log}.new; mv {log}.new {log}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(crashes, "_memory_short", lambda: None)
    seen = tmp_path / "pid"
    wait = f"Path({str(seen)!r}).write_text(str(os.getpid()))\nwhile not Path({str(log)!r}).exists(): time.sleep(0.01)"
    assert supervisor.run(child(wait)) == 0
    assert log.read_text() == f"-is -w {seen.read_text()}\n"


def test_the_supervisor_loads_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "mlx", "transformers", "pydantic", "safetensors", "rich"}
    script = f"import sys; import finetune.supervisor; sys.exit(sorted({heavy!r} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
