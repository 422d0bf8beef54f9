"""Logs figures to TensorBoard or Trackio, local only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Literal

from finetune.disk.run_folder import RunFolder
from finetune.errors import EnvironmentProblem
from finetune.events import Event, StepDone, Validated
from finetune.text import one_line

Tracker = tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]  # takes figures after a step; is closed


@contextmanager
def tracking(name: Literal["none", "tensorboard", "trackio"], run: RunFolder) -> Iterator[Callable[[Event], None]]:
    """Inside, each event is passed on, until the tracker fails. Raises EnvironmentProblem for a missing package."""
    if name == "none":
        yield lambda event: None
        return
    try:
        log, close = {"tensorboard": _tensorboard, "trackio": _trackio}[name](run)
    except ImportError as error:
        raise EnvironmentProblem(f"tracker: {name} is not installed ({error}); pip install {name}") from None
    logs = [log]

    def track(event: Event) -> None:
        if isinstance(event, StepDone | Validated) and logs:
            group = "train" if isinstance(event, StepDone) else "valid"
            values = {key: value for key, value in asdict(event).items() if key != "step" and value is not None}
            try:
                logs[0]({f"{group}/{key}": float(value) for key, value in values.items()}, event.step)
            except Exception as error:  # whatever it is, the run goes on
                logs.clear()
                print(one_line(f"tracker: {name} gets no more figures ({error!s:.200})"), file=sys.stderr)

    try:
        yield track
    finally:
        with suppress(Exception):
            close()


def _tensorboard(run: RunFolder) -> Tracker:
    from tensorboard.summary import Writer

    writer = Writer(str(run.path / "tensorboard"))
    return lambda figures, step: [writer.add_scalar(key, x, step) for key, x in figures.items()], writer.close


def _trackio(run: RunFolder) -> Tracker:
    import trackio

    trackio.init(project="finetune", name=run.path.name, resume="allow", embed=False)
    return lambda figures, step: trackio.log(figures, step=step), trackio.finish
