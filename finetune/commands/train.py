"""`train`, `resume` and `demo`: a run with its screen, its signals and its end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType

from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Interrupted
from finetune.events import Work, stoppable
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import open_screen, with_progress
from finetune.report.report import Report
from finetune.report.summary import print_account, print_report
from finetune.run import Run
from finetune.supervisor import announce_run
from finetune.training.job import making_ready


class StopFlag:
    """Raised by the first SIGINT or SIGTERM; a second signal raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def stopping(self) -> bool:
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"stopping after this step; press Ctrl-C again to stop at once\n")  # print is unsafe in a handler

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(recipe: Recipe, name: str, stopped: RunFolder | None = None) -> None:
    """A new run in a folder that begins with `name`, or the `stopped` one from its last intact checkpoint.

    Exits with 130 or 143 when a signal asks it to stop: after a checkpoint, once there are steps.
    """
    if stopped and stopped.report.exists():
        print(f"{stopped.path}: this run is finished; its report is {stopped.path / 'report.txt'}")
        return
    folder = stopped
    with StopFlag().listening() as stop:
        try:
            ready = making_ready(recipe, run=stopped.path if stopped else None)
            job = with_progress(stoppable(ready, stop, "preparing the data"))
            folder = folder or create(job.recipe, name)  # with the format and the task that were recognised
            announce_run(folder.path)
            print_account(job, folder)
            report = show_run(Run(job, folder), stop, resume=stopped is not None)
            print_report(report)
        except (Interrupted, KeyboardInterrupt) as end:
            remedy = f"; resume with: finetune resume {shlex.quote(str(folder.path))}" if folder else ""
            print(f"{str(end) or 'stopped at once'}{remedy}", file=sys.stderr)
            sys.exit(128 + (stop.signal or signal.SIGINT))


def show_run(run: Run, stop: StopFlag, resume: bool) -> Report:
    """Every event of the run on the screen. Raises Interrupted, after a checkpoint, once `stop` has its signal."""
    with closing(run.events(resume)) as events, open_screen() as screen:
        work = Work(events)
        for event in work:
            screen.show(event)
            run.stopping = stop.stopping
    return work.result
