"""`train`, `resume` and `demo`: a run with its screen, its signals and its end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import NoReturn

from backends.interface import Lost
from backends.process_group import find_place, watch
from finetune.disk.lock import locked
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import ExitCode, Interrupted, stopped_by
from finetune.events import Work, stoppable
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import STOPPING, open_screen, with_progress
from finetune.report.report import Report
from finetune.report.summary import print_account, print_report
from finetune.report.tracker import tracking
from finetune.run import Run
from finetune.signals import handled, listened_to
from finetune.supervisor import announce_lost, announce_run, process_id
from finetune.team_folder import failure
from finetune.text import command_line, one_line
from finetune.training.job import refuse_unused_accelerator
from finetune.training.several_processes import joined, leading, work_along
from finetune.training.suite_prompts import ready_with_suite


class StopFlag:
    """Raised by the first SIGINT, SIGTERM or SIGHUP; a second signal raises KeyboardInterrupt at once.

    A terminal that closes may say so twice, so of SIGHUP only the first counts.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.quiet = False  # while a screen says that the run will stop

    @property
    def stopping(self) -> bool:
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == getattr(signal, "SIGHUP", None):
                return
            raise KeyboardInterrupt
        self.signal = number
        if not self.quiet:
            with suppress(OSError):  # nobody reads it any more; and print is unsafe in a handler
                os.write(2, f"{STOPPING}\n".encode())

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        with handled(dict.fromkeys(listened_to(), self._receive)):
            yield self


def run(recipe: Recipe, name: str, stopped: RunFolder | None = None) -> None:
    """A new run in a folder that begins with `name`, or the `stopped` one from its last intact checkpoint.

    Exits with 130 or 143 when a signal asks it to stop: after a checkpoint, once there are steps.
    """
    here = find_place()
    if stopped and _finished(stopped, quiet=here is not None and here.rank > 0):
        return
    if here:
        watch(failure, give_up)
        recipe, group = joined(recipe, here)
    refuse_unused_accelerator(recipe)
    folder, others = stopped, None
    with StopFlag().listening() as stop, ExitStack() as held:
        try:
            if here and here.rank:
                stop.quiet = True
                work_along(recipe, group, lambda: stop.signal or 0)
                leave()
            if here:
                others = held.enter_context(leading(group, here))
            if stopped:
                lock = held.enter_context(locked(stopped.path, process_id()))
                if _finished(stopped):  # by the process that had the lock
                    return
            ready = ready_with_suite(recipe, stopped.path if stopped else None)
            job = with_progress(stoppable(ready, stop, "preparing the data"), stop)
            if folder is None:
                folder = create(job.recipe, name)  # with the format and the task that were recognised
                lock = held.enter_context(locked(folder.path, process_id()))
            announce_run(folder.path)
            print_account(job, folder)
            report = show_run(Run(job, folder, lock, others), stop, resume=stopped is not None)
            print_report(report)
        except (Interrupted, KeyboardInterrupt) as end:
            exit_stopped(end, stop, folder)
        except Lost:
            announce_lost()
            raise


def exit_stopped(end: BaseException, stop: StopFlag, folder: RunFolder | None) -> NoReturn:
    """Says how a run or a search that was asked to stop goes on, and exits with 130 or 143. folder: None: none yet."""
    remedy = f"; resume with: {command_line('finetune', 'resume', str(folder.path))}" if folder else ""
    print(one_line(f"{str(end) or 'stopped at once'}{remedy}"), file=sys.stderr)
    sys.exit(stopped_by(stop.signal or signal.SIGINT))


def leave() -> NoReturn:
    """For a process that has done its part of a run and keeps nothing: ends it without Python's own end.

    Threads of torch's gloo may outlive their group, and then abort an interpreter that is ending.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(0)


def give_up(reason: str) -> None:
    """For a process that waits for another one in native code, and for nothing."""
    announce_lost()
    with suppress(OSError):
        os.write(2, f"finetune: {one_line(reason)}\n".encode())
    os._exit(ExitCode.BUG)


def _finished(run: RunFolder, quiet: bool = False) -> bool:
    """Whether there is nothing left to do, which is said."""
    if not run.report.exists():
        return False
    if not quiet:
        print(one_line(f"{run.path}: this run is finished; its report is {run.path / 'report.txt'}"))
    return True


def show_run(run: Run, stop: StopFlag, resume: bool) -> Report:
    """Every event of the run on the screen. Raises Interrupted, after a checkpoint, once `stop` has its signal."""
    tracker = tracking(run.job.recipe.tracker, run.folder)
    with closing(run.events(resume)) as events, tracker as track, open_screen(stop=stop) as screen:
        work = Work(events)
        for event in work:
            screen.show(event)
            track(event)
            if run.others and run.others.asked:
                stop.signal = stop.signal or run.others.asked
            run.stopping = stop.stopping
    return work.result
