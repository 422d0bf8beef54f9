"""Out of memory at any step, in any micro-batch, again and again: the same loss curve to float32 rounding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.metrics import read
from finetune.events import Validated
from tests.faults.cases import cases
from tests.faults.toy import losses, run_to_the_end
from tests.unit.toy_run import session

TRAIN = {"micro_tokens": 400}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return run_to_the_end(folder / "run", session(folder / "model"), TRAIN)


def short_of_memory(live: Any, rng: random.Random) -> list[str]:
    """Some of all calls with more than one row fail, some of them half way through a step; the places are kept."""
    often, from_step, most = rng.choice((0.05, 0.3, 0.8)), rng.randrange(8), rng.choice((1, 3, 100))
    failed: list[str] = []

    def may_fail(real: Any, what: str) -> Any:
        def call(batch: Any, *rest: Any) -> Any:
            possible = len(batch.inputs) > 1 and live._step >= from_step and len(failed) < most
            if possible and rng.random() < often:
                failed.append(f"{what} after step {live._step}")
                raise MemoryError("as told")
            return real(batch, *rest)

        return call

    live._gradient = may_fail(live._gradient, "gradient")
    real = live.score

    def score(batch: Any) -> Any:
        from backends.reference import _memory_guard

        with _memory_guard():
            return may_fail(real, "score")(batch)

    live.score = score
    return failed


@pytest.mark.parametrize("case", cases(10, 100))
def test_the_loss_curve_stays_the_same(tmp_path: Path, plain: Path, case: int) -> None:
    live = session(tmp_path / "model")
    failed = short_of_memory(live, random.Random(case))
    run_to_the_end(tmp_path / "run", live, TRAIN)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), failed
    found, expected = (
        [one.loss for one in read(run / "metrics.jsonl") if isinstance(one, Validated)]
        for run in (tmp_path / "run", plain)
    )
    assert found == pytest.approx(expected, rel=1e-5), failed


def test_the_cases_do_fail(tmp_path: Path) -> None:
    counts = []
    for case in range(10):
        live = session(tmp_path / f"model{case}")
        failed = short_of_memory(live, random.Random(case))
        run_to_the_end(tmp_path / f"run{case}", live, TRAIN)
        counts.append(len(failed))
    assert sum(1 for count in counts if count) >= 7
    assert max(counts) >= 3
