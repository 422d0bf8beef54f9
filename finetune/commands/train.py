"""`train`, `resume` and `demo`: a run with its screen, its signals and its end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Interrupted
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import open_screen
from finetune.report.summary import print_account, print_report
from finetune.run import train_run
from finetune.supervisor import tell_run
from finetune.training.job import load_job


class StopFlag:
    """True once SIGINT or SIGTERM has come; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"stopping after this step; once more to stop at once\n")  # print is not for signal handlers

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(recipe: Recipe, name: str) -> None:
    """A new run in a folder that begins with `name`."""
    _go(recipe, None, name)


def resume(run: RunFolder, recipe: Recipe, backend: str | None) -> None:
    """A stopped run from its newest good checkpoint; nothing where it is finished."""
    if run.report.exists():
        print(f"{run.path}: this run is finished; its report is {run.path / 'report.txt'}")
        return
    if backend:
        recipe = recipe.model_copy(update={"backend": backend})
    _go(recipe, run, run.path.name)


def _go(recipe: Recipe, run: RunFolder | None, name: str) -> None:
    """One run, new or resumed; exits 130 or 143 after a checkpoint when a signal asked for it."""
    with StopFlag().listening() as stop:
        job = load_job(recipe)
        resuming = run is not None
        run = run or create(job.recipe, name)  # with the format and the task that were recognised
        tell_run(run.path)
        print_account(job, run)
        try:
            with open_screen() as screen:
                report = train_run(job, run, screen.handle, stop, resume=resuming)
            print_report(report, run)
        except (Interrupted, KeyboardInterrupt) as end:
            how = str(end) or "stopped at once"
            print(f"{how}; go on with: finetune resume {shlex.quote(str(run.path))}", file=sys.stderr)
            sys.exit(128 + (stop.signal or signal.SIGINT))
