"""SIGINT, SIGTERM and two SIGINTs at random moments of a whole run: 130 or 143, and gone on with the same to the byte.

Each of them at a chosen moment, on each backend: `end_to_end/test_run.py` and `end_to_end/test_commands.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.command import SIGINT, SIGTERM, Work, ended, newest, same
from tests.end_to_end.test_run import RECIPE
from tests.faults.cases import cases

COMMAND = ("train", "recipe.yaml", "--backend", "reference", "train.steps=12")
KINDS = {"interrupted": [SIGINT], "terminated": [SIGTERM], "interrupted twice": [SIGINT, SIGINT]}


@pytest.fixture(scope="module")
def whole(make_work: Callable[[], Work]) -> tuple[Work, Path, float]:
    """A run that nobody stopped, and how long it took from its folder on, in seconds."""
    work = make_work()
    work.recipe(RECIPE)
    process, making = work.start(*COMMAND), newest(work, 0)
    while making() is None:
        time.sleep(0.001)
    began = time.monotonic()
    ended(process).good()
    return work, work.runs()[0], time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1, 30))
def test_at_any_moment(whole: tuple[Work, Path, float], case: int) -> None:
    work, run, seconds = whole
    kind = list(KINDS)[(case + 2) % 3]
    rng, making = random.Random(case), newest(work, len(work.runs()))
    process = work.start(*COMMAND)
    if case % 5:  # else before there is a run
        while making() is None:
            time.sleep(0.001)
    time.sleep(rng.random() * seconds)
    for number in KINDS[kind]:
        process.send_signal(number)
        time.sleep(rng.random() * 0.2)
    answer = ended(process)
    dead = () if making() else (-KINDS[kind][0],)  # before anything listened; a shell says 130 or 143 to that too
    assert answer.code in (0, 128 + KINDS[kind][0], *dead), f"{kind}: {answer}"
    assert "Traceback" not in answer.err, f"{kind}: {answer.err}"
    if (again := making()) is not None:
        names = (f"finetune resume {again.relative_to(work.folder)}", f"{again.relative_to(work.folder)}/report.txt")
        assert answer.code == 0 or any(name in answer.err for name in names)
        work.finetune("resume", str(again)).good()
        same(again, run)
