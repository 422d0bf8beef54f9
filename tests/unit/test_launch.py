"""`--devices`: what is started, whose end counts, that no process is left, and what a launcher tells each of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from backends import process_group, table, timeouts
from backends.interface import BackendError
from finetune import launch, team_folder
from finetune.errors import ExitCode, RecipeError
from finetune.team_folder import End

JOINED = [name for name, row in table.BACKENDS.items() if row.launcher]


def end(rank: int, code: int, seconds: float, lost: bool = False) -> End:
    return End(rank, code, lost, seconds)


@pytest.mark.parametrize(
    ("ends", "launcher", "asked", "code"),
    [
        ([end(1, 0, 1), end(0, 0, 2)], 0, 0, 0),
        ([end(1, 5, 1), end(0, 1, 2, lost=True)], 0, 0, 5),
        ([end(0, 1, 1, lost=True), end(1, 5, 2)], 0, 0, 5),  # the connection broke before the cause was written down
        ([end(0, 4, 1), end(1, 0, 2)], 0, 0, 4),
        ([end(0, 130, 1), end(1, 0, 2)], 0, signal.SIGINT, 130),
        ([end(0, 1, 3, lost=True)], 1, 0, 1),  # a supervisor was killed
        ([], 0, 0, 1),  # it has started nothing
        ([], 1, 0, 1),
        ([], -15, signal.SIGTERM, 143),  # before any process had begun
    ],
)
def test_the_exit_code_is_that_of_the_cause(ends: list[End], launcher: int, asked: int, code: int) -> None:
    assert launch.code_of(ends, launcher, asked) == code


def test_the_same_command_is_started_without_devices() -> None:
    for given in (["--devices", "2"], ["--devices=2"], ["--backend", "x", "--devices", "all"]):
        assert launch.without_devices(["train", *given, "r.yaml", "seed=1"]) == ["train", "r.yaml", "seed=1"]


@pytest.mark.parametrize("devices", ["0", "-1", "two", "", "1.5", "100000", "²"])
def test_what_is_no_number_of_processes_is_refused(devices: str) -> None:
    with pytest.raises(RecipeError, match="--devices"):
        launch.processes(devices, JOINED[0])


def test_one_process_is_this_one() -> None:
    assert launch.launch("1", JOINED[0], alone=False) is None
    assert launch.launch(None, JOINED[0], alone=False) is None


def test_a_backend_of_one_process_says_so() -> None:
    with pytest.raises(BackendError, match="one process"):
        launch.launch("2", "reference", alone=False)
    with pytest.raises(RecipeError, match="exclude each other"):
        launch.launch("2", JOINED[0], alone=True)


@pytest.mark.parametrize("name", JOINED)
def test_a_launcher_s_command_runs_this_very_program(name: str) -> None:
    command = process_group.launcher(name).command(3, ["train", "r.yaml"])
    assert command[0] == sys.executable and command[-2:] == ["train", "r.yaml"]
    assert any("3" in word for word in command)


def hostfile(folder: Path, *hosts: str) -> str:
    file = folder / f"{len(hosts)}-hosts.json"
    file.write_text(json.dumps([[host] for host in hosts]) if hosts else "")
    return str(file)


def test_a_process_knows_its_place(tmp_path: Path) -> None:
    def found(**environment: str) -> tuple[int, ...] | None:
        here = process_group.find_place(environment)
        return here and (here.rank, here.size, here.local_rank, here.local_size)

    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    two_machines = hostfile(tmp_path, "10.0.0.1:5", "10.0.0.1:6", "10.0.0.2:5")
    assert found() is None
    assert found(**torchrun) == (3, 4, 1, 2)
    assert found(RANK="0", WORLD_SIZE="1", MASTER_ADDR="x") is None
    assert found(RANK="0", WORLD_SIZE="2") is None  # of another program
    assert found(MLX_RANK="2", MLX_HOSTFILE=two_machines) == (2, 3, 0, 1)
    assert found(MLX_RANK="1", MLX_HOSTFILE=two_machines) == (1, 3, 1, 2)
    assert found(MLX_RANK="1", MLX_WORLD_SIZE="2") == (1, 2, 1, 2)
    assert found(MLX_RANK="0", MLX_HOSTFILE=hostfile(tmp_path)) is None
    for nonsense in ({**torchrun, "RANK": "x"}, {"MLX_RANK": "9", "MLX_HOSTFILE": two_machines}, {"MLX_RANK": ""}):
        with pytest.raises(BackendError, match="cannot be read"):
            found(**nonsense)


# A launcher of so many processes, each of which does what its letter says.
_LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
own = [subprocess.Popen([sys.executable, "-c", sys.argv[1], letter], env={**os.environ, "RANK": str(rank)})
       for rank, letter in enumerate(sys.argv[2])]
for one in own:
    one.wait()
"""
_PROCESS = """
import os, signal, sys, time
from finetune import team_folder
def stop(number, frame):
    team_folder.ended(143 if number == signal.SIGTERM else 130, False)
    os._exit(0)
letter = sys.argv[1]
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
team_folder.started(os.getpid())
if letter == "h":
    time.sleep(60)
team_folder.ended({"f": 5}.get(letter, 0), False)
"""


def launched(folder: Path, letters: str) -> int:
    team_folder.begin(folder)
    environment = os.environ | {team_folder.VARIABLE: str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    return launch.run([sys.executable, "-c", _LAUNCHER, _PROCESS, letters], environment, folder)


def gone(folder: Path) -> bool:
    return not any(team_folder.alive(member.child) for member in team_folder.members(folder))


@pytest.mark.parametrize(("letters", "code"), [("gg", 0), ("gf", 5)])
def test_the_processes_end_by_themselves(tmp_path: Path, letters: str, code: int) -> None:
    assert launched(tmp_path, letters) == code
    assert [member.rank for member in team_folder.members(tmp_path)] == [0, 1] and gone(tmp_path)


def test_who_hangs_after_another_has_failed_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE", 0.3)
    assert launched(tmp_path, "hf") == 5
    assert gone(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_first_process(tmp_path: Path, number: int, code: int) -> None:
    def ask() -> None:
        until = time.monotonic() + 30
        while len(team_folder.members(tmp_path)) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    assert launched(tmp_path, "hg") == code
    asking.join()


def test_what_is_known_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert team_folder.failure() is None
    assert not team_folder.ended(1, False)  # no process of `--devices`
    monkeypatch.setenv(team_folder.VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    team_folder.begin(tmp_path)
    assert team_folder.failure() is None
    assert team_folder.ended(5, False)
    assert team_folder.failure() is None  # its own
    monkeypatch.setenv("RANK", "0")
    assert team_folder.failure() == "process 1 has ended (exit code 5)"
    with subprocess.Popen([sys.executable, "-c", ""]) as short:
        short.wait()
    (tmp_path / "top").write_text(str(short.pid))
    assert team_folder.failure() == "the command that started this process is gone"


def watched(monkeypatch: pytest.MonkeyPatch, failed: Mapping[str, str], patience: float, seconds: float) -> list[str]:
    """What is said while this thread waits for so long."""
    said: list[str] = []
    monkeypatch.setattr(timeouts, "_TICK", 0.01)
    monkeypatch.setattr(timeouts, "_GRACE", 0.05)
    timeouts.watch(lambda: failed.get("why"), said.append)
    with timeouts.waiting(patience):
        time.sleep(seconds)
    return said


def test_a_wait_that_lasts_too_long_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has not answered" in watched(monkeypatch, {}, 0.05, 0.5)[0]
    assert watched(monkeypatch, {}, 60.0, 0.2) == []


def test_a_wait_for_who_has_failed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, {"why": "process 1 has ended"}, 60.0, 0.5)[0] == "process 1 has ended"


def test_codes_are_of_the_table() -> None:
    assert {ExitCode.BUG, ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.DONE} >= {
        launch.code_of([], launcher, asked) for launcher in (0, 1) for asked in (0, signal.SIGINT, signal.SIGTERM)
    }
