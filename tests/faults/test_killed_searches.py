"""A search that is killed at random moments, ten times, ends with the same winner and the same bytes."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import Work, ended, wait_for
from tests.unit.test_search import RECIPE
from tests.unit.test_suspects import labelled

KILLS = 10
SEARCH = (
    "search",
    "few.yaml",
    "--budget",
    "20m",
)  # all trials fit, so that time decides nothing


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    made = Work.of_one_block(tmp_path_factory)
    rows = [{"text": example.prompt, "label": str(example.answer)} for example in labelled(60, set())]
    for name, part in (("rows", rows[:36]), ("valid", rows[36:48]), ("test", rows[48:])):
        made.lines(f"{name}.jsonl", part)
    made.recipe(RECIPE, "few.yaml")
    return made


@pytest.mark.slow
def test_a_search_killed_ten_times_has_the_same_winner_and_bytes(work: Work) -> None:
    """The supervisor is killed, or its child, from the start of the search's folder on; then it is gone on with."""
    began = time.monotonic()
    work.finetune(*SEARCH, "output=whole").good()
    seconds, kills, rng = time.monotonic() - began, 0, random.Random(0)
    (whole,) = (work.folder / "whole").iterdir()
    search, ends = 0, set()
    while kills < KILLS:
        search += 1
        output = work.folder / f"killed-{search}"
        process = work.start(*SEARCH, f"output={output}")
        wait_for(lambda: output.exists() and any(output.iterdir()), process)  # noqa: B023
        for _ in range(3):
            time.sleep(rng.random() * seconds / 2)
            if process.poll() is not None:
                break
            (psutil.Process(process.pid).children()[0] if rng.random() < 0.5 else process).kill()
            kills += 1
            ended(process)
            ends.add(where(folder_of(output)))
            process = work.start("resume", str(folder_of(output)))
        ended(process).good()
        same(folder_of(output), whole)
    assert len(ends) > KILLS // 2, f"the kills should meet many moments, and met {ends}"


def folder_of(output: Path) -> Path:
    (folder,) = output.glob("few-search-*")
    return folder


def where(search: Path) -> tuple[int, bool]:
    """How many laps are done, and whether the winner is known."""
    ledger = search / "search.json"
    return (len(json.loads(ledger.read_text())["laps"]) if ledger.exists() else 0), (search / "best").exists()


def same(search: Path, whole: Path) -> None:
    ledgers = [json.loads((folder / "search.json").read_text()) for folder in (search, whole)]
    assert ledgers[0]["winner"] == ledgers[1]["winner"] and ledgers[0]["plan"] == ledgers[1]["plan"]
    laps = [{(lap["trial"], lap["steps"], lap["loss"]) for lap in ledger["laps"]} for ledger in ledgers]
    assert laps[0] == laps[1]
    for name in ("adapter/adapter_model.safetensors", "evaluation-tuned.json", "evaluation-base.json"):
        assert (search / "best" / name).read_bytes() == (whole / "best" / name).read_bytes(), name
