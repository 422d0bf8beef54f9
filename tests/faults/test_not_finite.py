"""NaN and infinity in the loss, a gradient, a weight or a moment, at any step: exit 4, and none of it on the disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.disk import checkpoint as checkpoints
from finetune.errors import Diverged
from tests.end_to_end.command import Work
from tests.faults.cases import cases
from tests.faults.toy import run_to_the_end
from tests.unit.toy_run import session

STEPS = 8
VALUES = (np.nan, np.inf, -np.inf)


def _in_the_loss(live: Any, step: int, value: float, rng: random.Random) -> None:
    real = live._gradient

    def gradient(*args: Any) -> tuple[float, dict[str, Any]]:
        loss, grads = real(*args)
        return (value if live._step + 1 == step else loss), grads

    live._gradient = gradient


def _in_a_gradient(live: Any, step: int, value: float, rng: random.Random) -> None:
    real = live._gradient

    def gradient(*args: Any) -> tuple[float, dict[str, Any]]:
        loss, grads = real(*args)
        if live._step + 1 == step:
            _spoil(grads, value, rng)
        return loss, grads

    live._gradient = gradient


def _before_a_step(held: str) -> Callable[..., None]:
    def inject(live: Any, step: int, value: float, rng: random.Random) -> None:
        real = live.step

        def one_step(*args: Any) -> Any:
            if live._step + 1 == step:
                _spoil(getattr(live, held), value, rng)
            return real(*args)

        live.step = one_step

    return inject


def _in_a_weight_after(live: Any, step: int, value: float, rng: random.Random) -> None:
    """As a kernel that writes the wrong thing and says nothing."""
    real = live.step

    def one_step(*args: Any) -> Any:
        result = real(*args)
        if live._step == step:
            _spoil(live._adapter, value, rng)
        return result

    live.step = one_step


def _in_the_scores(live: Any, step: int, value: float, rng: random.Random) -> None:
    real = live.score

    def score(batch: Any) -> Any:
        found = real(batch)
        return (
            found
            if live._step < step
            else replace(found, logprob=np.where(batch.weights, np.float32(value), found.logprob))
        )

    live.score = score


def _spoil(tensors: dict[str, Any], value: float, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[rng.randrange(tensors[name].size)] = value


INJECTIONS = {
    "loss": _in_the_loss,
    "gradient": _in_a_gradient,
    "weight": _before_a_step("_adapter"),
    "weight after": _in_a_weight_after,
    "moment": _before_a_step("_moments"),
    "scores": _in_the_scores,
}


def finite(text: str) -> Any:
    """Of JSON; raises AssertionError where it holds NaN or Infinity."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} on the disk")

    return json.loads(text, parse_constant=refuse)


def assert_all_finite(folder: Path) -> None:
    """Every tensor and every JSON value under the folder."""
    seen = 0
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            assert all(np.isfinite(tensor).all() for tensor in load_file(file).values()), file
        elif file.suffix == ".json":
            finite(file.read_text())
        elif file.suffix == ".jsonl":
            assert [finite(line) for line in file.read_text().splitlines()], file
        else:
            continue
        seen += 1
    assert seen > 4


@pytest.mark.parametrize("case", cases(8, 60))
def test_what_is_not_finite_ends_the_run_and_is_not_written(tmp_path: Path, case: int) -> None:
    rng = random.Random(case)
    kind, value = list(INJECTIONS)[case % len(INJECTIONS)], VALUES[case // len(INJECTIONS) % 3]
    step = rng.randint(2 if kind == "moment" else 1, STEPS)
    if kind == "moment":
        value = abs(value)  # a root of a negative second moment is not what is tried here
    live: Any = session(tmp_path / "model")
    INJECTIONS[kind](live, step, value, rng)
    with pytest.raises(Diverged) as caught:
        run_to_the_end(tmp_path / "run", live)
    assert caught.value.exit_code == 4, kind
    assert_all_finite(tmp_path / "run")
    saved, messages = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    assert not messages
    assert saved is not None
    assert saved.state.step <= step


@pytest.mark.slow
def test_the_command_line_ends_with_4(work: Work) -> None:
    recipe = "data: {train: train.jsonl}\ntrain: {steps: 8, checkpoint_every: 2, warmup: 0.9}\nbackend: reference\n"
    wild, fine = work.several(
        ["train", work.recipe(recipe), "train.learning_rate=1e37", "train.clip_norm=1e37"], ["train", "recipe.yaml"]
    )
    assert "Lower train.learning_rate" in wild.failed(4) or "lower train.learning_rate" in wild.failed(4)
    fine.good()
    assert_all_finite(work.runs()[0])


def test_the_scan_finds_what_is_not_finite(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "run")
    assert_all_finite(tmp_path / "run")
    (tmp_path / "run" / "loop.json").write_text('{"loss": [1, NaN]}')
    with pytest.raises(AssertionError, match="NaN on the disk"):
        assert_all_finite(tmp_path / "run")
