"""The terminal closes, or whoever reads our output ends: the step is finished, a checkpoint written, 143 or 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import supervisor
from finetune.errors import ExitCode, stopped_by
from tests.end_to_end.command import ROOT, Work, losses, newest, steps_done, stopped, wait_for
from tests.end_to_end.test_run import RECIPE
from tests.unit.test_supervisor import STOPS, child, supervised

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
COMMAND = ("--backend", "reference", "train.steps=300", "train.checkpoint_every=300")


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """The tests themselves may be, and what is ignored here is ignored by every process that is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def checkpoint_of_its_last_step(run: Path) -> None:
    done = losses(run)[-1][0]
    assert 0 < done < 300
    assert (run / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()


def test_a_closed_terminal_is_a_request_to_stop() -> None:
    assert [stopped_by(number) for number in (2, 15, 1)] == [130, 143, 143]
    assert "SIGHUP" in ExitCode(143).meaning
    process = supervised(STOPS.replace("(2, 15)", "(1,)").replace("128 + got[0]", "143"), "1")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("[1]\n", 143)


def test_a_child_that_it_ends_at_once_counts_as_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    code = "signal.signal(1, signal.SIG_DFL); os.kill(os.getpid(), 1); time.sleep(60)"
    assert supervisor.run(child(code)) == 143
    assert "ended by SIGHUP" in capfd.readouterr().err


def test_nohup_keeps_its_promise() -> None:
    code = "from finetune import signals; print(*[int(n) for n in signals.listened_to()])"
    ignoring = f"import signal; signal.signal(1, signal.SIG_IGN); {code}"
    said = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for text in (code, ignoring)
    ]
    assert said == ["2 15 1\n", "2 15\n"]


@pytest.mark.slow
def test_hung_up_the_run_finishes_its_step_and_goes_on_later(work: Work) -> None:
    making = newest(work, 0)
    answer = stopped(work, work.start("train", work.recipe(RECIPE), *COMMAND), making, 3, signal.SIGHUP)
    assert answer.code == 143, answer
    assert "Traceback" not in answer.err
    run = making()
    assert run is not None
    checkpoint_of_its_last_step(run)


@pytest.mark.parametrize(
    "alone",
    [
        pytest.param([], id="supervised"),
        pytest.param(["--no-supervisor"], id="alone", marks=pytest.mark.slow),
    ],
)
def test_control_c_that_takes_the_reader_of_the_pipe_along(work: Work, alone: list[str]) -> None:
    """`finetune train recipe.yaml 2>&1 | tee log`, in a group of its own."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "finetune", "train", work.recipe(RECIPE), *COMMAND, *alone]
    process = subprocess.Popen(
        command, cwd=work.folder, env=work.env, stdout=write, stderr=write, stdin=subprocess.DEVNULL
    )
    os.close(write)
    making = newest(work, 0)
    wait_for(lambda: (run := making()) is not None and steps_done(run) > 2, process)  # type: ignore[arg-type]
    os.close(read)  # the reader dies first, so that every print fails
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    run = making()
    assert run is not None
    checkpoint_of_its_last_step(run)


@pytest.mark.slow
def test_a_reader_that_ends_early_ends_no_run(work: Work) -> None:
    """`finetune train recipe.yaml 2>&1 | head -1`"""
    process = work.start("train", work.recipe(RECIPE), "--backend", "reference", "train.steps=4")
    assert process.stderr is not None and process.stdout is not None
    process.stderr.close()
    process.stdout.close()
    assert process.wait(120) == 0
    assert (work.runs()[0] / "report.json").exists()


@pytest.mark.parametrize("to", ["a closed pipe", "a file"])
def test_a_page_that_nobody_reads_is_no_error(work: Work, to: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with (work.folder / "page").open("wb") as page:
        target = write if to == "a closed pipe" else page.fileno()
        done = subprocess.run(
            [sys.executable, "-m", "finetune", "schema"],
            cwd=work.folder, env=work.env, stdout=target, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert to == "a closed pipe" or b"checkpoint_minutes" in (work.folder / "page").read_bytes()


def test_a_log_on_a_full_disk_is_still_an_error(work: Work) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("Linux has a device that is always full")
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "finetune", "schema"]
        done = subprocess.run(command, env=work.env, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode


# The chat template's process

RENDERS = """
import os, sys, threading
from types import SimpleNamespace
from finetune.data import conversation, template_sandbox as sandbox
conversation.SECONDS = 600.0
tokenizer = SimpleNamespace(name_or_path="toy", special_tokens_map={}, get_chat_template=lambda *_: sys.argv[1])
def start():
    real = sandbox.TemplateProcess.__init__
    def init(self):
        real(self); print(self._process.pid, flush=True)
    sandbox.TemplateProcess.__init__ = init
    sandbox.render(tokenizer, sandbox.Conversation([{"role": "user", "content": "x"}], [(1, False)]))
start() if sys.argv[2] == "main" else threading.Thread(target=start).run()
"""
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ONE_CALL = "{{ (7 ** (7 ** 8)) % 3 }}"  # minutes within one call of C, which no thread of the child can interrupt


@pytest.mark.parametrize("template", [LOOPS, ONE_CALL] if sys.platform == "linux" else [LOOPS])
def test_a_template_that_loops_dies_with_a_command_that_is_killed(template: str) -> None:
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-c", RENDERS, template, "main"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    renderer = psutil.Process(int(process.stdout.readline()))
    while renderer.cpu_times().user < 2.5:  # it has loaded transformers, and is at the template
        assert process.poll() is None
    process.kill()
    process.communicate()
    renderer.wait(10)


def test_without_the_systems_help_the_pipe_tells_it() -> None:
    """What ends it elsewhere than on Linux, and where a thread other than the main one began it."""
    code = (
        "import sys, time; from finetune.data import template_child as c; c._end_with(0, False)\n"
        "print('ready', flush=True)\nwhile True: pass"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()
