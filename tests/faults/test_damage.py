"""Each file of a stopped run deleted, emptied, cut or changed, and the run gone on with by `finetune resume`.

It falls back to the checkpoint before, says so, and ends the same to the byte; or it is refused with exit code 8.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.disk import checkpoint as checkpoints
from finetune.disk.metrics import MetricsFile
from tests.end_to_end.command import Work, ended, newest, same, wait_for
from tests.end_to_end.test_run import RECIPE
from tests.faults.cases import cases
from tests.faults.toy import run_to_the_end
from tests.unit.test_checkpoint import FILES

SHORT = ["train.steps=12", "train.checkpoint_every=2", "evaluate.every=4", "--backend", "reference"]
RUN_FILES = (
    "recipe.yaml",
    "identity.json",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "evaluation-base.json",
    "held-out.jsonl",
)
WITHOUT_PLOTS = "from finetune.report import summary; summary.loss_plot = summary.confusion_plot = lambda *_: None"
Stopped = tuple[Work, Path, Path]  # the working folder, the run that nobody stopped, the run that was


@pytest.fixture(scope="module")
def stopped(make_work: Callable[[], Work]) -> Stopped:
    work = make_work()
    command = ["train", work.recipe(RECIPE), *SHORT]
    work.finetune(*command).good()
    (whole,) = work.runs()
    process, making = work.start(*command), newest(work, 1)

    def third() -> bool:
        found = making()
        return found is not None and (found / "checkpoints" / "step-00000006").exists()

    wait_for(third, process)
    process.kill()
    ended(process)
    run = making()
    assert run is not None
    return work, whole, run


def deleted(data: bytes, rng: random.Random) -> bytes | None:
    return None


def emptied(data: bytes, rng: random.Random) -> bytes | None:
    return b""


def truncated(data: bytes, rng: random.Random) -> bytes | None:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes | None:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


FAULTS = (deleted, emptied, truncated, flipped)


def damaged(run: Path, copy: Path, file: str, fault: Callable[..., bytes | None], seed: int) -> Path:
    shutil.copytree(run, copy)
    data = (copy / file).read_bytes()
    (copy / file).unlink()
    if (left := fault(data, random.Random(f"{file}-{seed}"))) is not None:
        (copy / file).write_bytes(left)
    return copy


def resumed(
    stopped: Stopped, files: list[str], seed: int, copies: Path, faults: Any = FAULTS
) -> list[tuple[str, Path, int, str]]:
    """Each file with each fault, in a copy of the run: (what, the copy, the exit code, all that was said)."""
    work, _, run = stopped
    made = {
        f"{file} {fault.__name__}": damaged(run, copies / f"{number}-{fault.__name__}", file, fault, seed)
        for number, file in enumerate(files)
        for fault in faults
    }
    answers = work.several(*(["resume", str(copy)] for copy in made.values()), before=WITHOUT_PLOTS)
    return [(what, made[what], one.code, one.out + one.err) for what, one in zip(made, answers, strict=True)]


def newest_of(run: Path) -> str:
    return max(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", cases(1, 5))
def test_a_damaged_checkpoint_falls_back_and_ends_the_same(stopped: Stopped, tmp_path: Path, seed: int) -> None:
    last = newest_of(stopped[2])
    for what, copy, code, said in resumed(stopped, [f"checkpoints/{last}/{name}" for name in FILES], seed, tmp_path):
        assert code == 0, f"{what}: {said}"
        assert f"{last} is broken" in said.replace("\n", ""), f"{what}: not a word of it"
        same(copy, stopped[1])
        assert not (copy / "checkpoints" / f"{last}.broken").exists() or newest_of(copy) != last


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_file_of_the_run_that_is_lost_is_refused_or_ends_the_same(
    stopped: Stopped, tmp_path: Path, seed: int
) -> None:
    for what, copy, code, said in resumed(stopped, list(RUN_FILES), seed, tmp_path, FAULTS[:3]):
        assert "Traceback" not in said, what
        assert code in (0, 2, 8), f"{what}: {said}"
        if code:
            assert str(copy) in said, f"{what}: the file is not named in {said}"
        elif "metrics.jsonl has lost" in said.replace("\n", " "):
            assert "metrics.jsonl" in what
            assert_same_weights(copy, stopped[1])
        else:
            same(copy, stopped[1])


def test_steps_that_the_metrics_have_lost_are_counted(tmp_path: Path) -> None:
    file = run_to_the_end(tmp_path / "run") / "metrics.jsonl"
    with MetricsFile(file) as metrics:
        assert metrics.missing(8) == 0
    lines = [line for line in file.read_text().splitlines() if '"StepDone", "step": 3,' not in line]
    file.write_text("\n".join(lines[:8]) + "\n")
    with MetricsFile(file) as metrics:
        told = sum('"StepDone"' in line for line in lines[:8])
        assert metrics.missing(8) == 8 - told > 1


def assert_same_weights(run: Path, other: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", f"checkpoints/{newest_of(other)}/state.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_without_any_good_checkpoint_it_begins_again(stopped: Stopped, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped[2], tmp_path / "copy")
    for file in copy.glob("checkpoints/*/state.safetensors"):
        file.unlink()
    (answer,) = stopped[0].several(["resume", str(copy)], before=WITHOUT_PLOTS)
    assert answer.good().err.count("is broken") == len(list(stopped[2].glob("checkpoints/*")))
    same(copy, stopped[1])


@pytest.mark.slow
def test_a_reader_that_does_not_verify_is_found(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"checkpoints/{newest_of(stopped[2])}/state.safetensors"
    copy = damaged(stopped[2], tmp_path / "copy", file, lambda data, rng: data[:-1] + bytes([data[-1] ^ 1]), 0)
    honest, _ = checkpoints.load_newest(shutil.copytree(copy, tmp_path / "other") / "checkpoints")
    assert honest is not None
    assert f"step-{honest.state.step:08d}" != newest_of(stopped[2])
    trusting = lambda path: {one.name: one.read_bytes() for one in path.iterdir()}  # noqa: E731
    monkeypatch.setattr(checkpoints, "read_verified", trusting)
    wrong, _ = checkpoints.load_newest(copy / "checkpoints")
    assert wrong is not None
    assert f"step-{wrong.state.step:08d}" == newest_of(stopped[2]), "so it is the check alone that finds it"
