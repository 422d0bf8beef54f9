"""The real command line in processes of its own, and a folder with a tiny model and data for it to work in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.metrics import read
from finetune.events import StepDone
from tests.unit.toy_run import curve

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds

# Several commands in one process: what is heavy is imported once.
_SEVERAL = """
import contextlib, io, json, sys
from finetune.cli import main
exec(sys.argv[2])
answers = []
for arguments, typed in json.loads(sys.argv[1]):
    alone = ["--no-supervisor"] if arguments[0] in ("train", "resume", "demo") else []
    sys.argv, sys.stdin, code = ["finetune", *arguments, *alone], io.StringIO(typed), 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    def good(self) -> Answer:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        assert "\x1b" not in self.out + self.err, "escape codes in a pipe"
        assert "Warning" not in self.err, self.err
        return self

    def failed(self, code: int) -> str:
        """The message of a failure that was foreseen: no traceback, nothing but `finetune: ...` at the end."""
        assert self.code == code, f"exit {self.code}, not {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        assert "\nfinetune: " in f"\n{self.err}"
        return self.err[f"\n{self.err}".rindex("\nfinetune: ") :].strip()


class Work:
    """A working folder; `model` stands in it as a link."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").symlink_to(model, target_is_directory=True)
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for name in ("FORCE_COLOR", "COLUMNS", "PYTHONWARNINGS"):
            self.env.pop(name, None)

    @classmethod
    def of_one_block(cls, folders: pytest.TempPathFactory) -> Work:
        """In new folders, with a random model of one block. Skips the test where torch is not here."""
        pytest.importorskip("torch")
        from tests.tiny_models import model_with_tokenizer

        model = model_with_tokenizer(folders.mktemp("models") / "model", num_hidden_layers=1)
        return cls(folders.mktemp("work"), model)

    def lines(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        file = self.folder / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def recipe(self, text: str, name: str = "recipe.yaml") -> str:
        (self.folder / name).write_text(f"model: {{path: model}}\n{text}", encoding="utf-8")
        return name

    def start(self, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune", *arguments],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **settings,
        )

    def finetune(self, *arguments: str, **settings: Any) -> Answer:
        return ended(self.start(*arguments, **settings))

    def several(self, *commands: Sequence[str], typed: str = "", before: str = "") -> list[Answer]:
        """Each command's answer, all of one process; `typed` is standard input to each, `before` is code run first."""
        given = json.dumps([[list(command), typed] for command in commands])
        command = [sys.executable, "-c", _SEVERAL, given, before]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, text=True, capture_output=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr
        return [Answer(*one) for one in json.loads(done.stdout.splitlines()[-1])]

    def runs(self) -> list[Path]:
        return sorted((self.folder / "runs").glob("*"), key=lambda path: path.stat().st_ctime_ns)


def ended(process: subprocess.Popen[str]) -> Answer:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.kill()
        raise
    return Answer(process.returncode, out, err)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; fails when the process ends before."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"it ended too soon: {ended(process)}"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.001)


def steps_done(run: Path) -> int:
    """How many optimiser steps metrics.jsonl tells of, however it stands."""
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b'"StepDone"')
    return 0


def stopped(
    work: Work, process: subprocess.Popen[str], run: Callable[[], Path | None], steps: int, number: int
) -> Answer:
    """Signal `number` sent once the run has done so many steps."""
    wait_for(lambda: (found := run()) is not None and steps_done(found) >= steps, process)
    process.send_signal(number)
    return ended(process)


def newest(work: Work, before: int) -> Callable[[], Path | None]:
    """The run that is made after there were `before`."""
    return lambda: runs[-1] if len(runs := work.runs()) > before else None


def losses(run: Path) -> list[Any]:
    return curve([event for event in read(run / "metrics.jsonl") if isinstance(event, StepDone)])


def same(run: Path, other: Path) -> None:
    """The same losses, the same weights, the same answers: to the byte."""
    assert losses(run) == losses(other)
    adapter, whole = ["adapter/adapter_model.safetensors", "adapter/adapters.safetensors"], ["model/model.safetensors"]
    names = whole if (other / "model").exists() else adapter
    for name in [*names, "rows.jsonl", f"checkpoints/{last_checkpoint(other)}/state.safetensors"]:
        assert (run / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"


def last_checkpoint(run: Path) -> str:
    return sorted(path.name for path in (run / "checkpoints").iterdir())[-1]


def reviews(first: int, count: int) -> list[dict[str, str]]:
    words = {"positive": "a fine good warm film", "negative": "a dull bad cold film"}
    labels = ("positive", "negative")
    return [{"text": f"{words[labels[i % 2]]} {i}", "label": labels[i % 2]} for i in range(first, first + count)]


SIGINT, SIGTERM, SIGKILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
