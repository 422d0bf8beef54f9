"""Peak memory of DPO and ORPO beside plain training on the same tokens: `python -m tests.benchmarks.pair_memory`.

A random Llama, float32; plain training imitates both answers of each pair. A process for each, which loads the model,
and trains; what is counted is the resident set (Linux). Names of backends and of SHAPES after the command choose some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import BASE, Peaks, specs, write_model

PAIRS, STEPS = 8, 2
BACKENDS = ("torch", "mlx")
SHAPES = {"chat": (256, 64, 96), "short prompts": (24, 160, 200), "long": (512, 160, 200)}  # prompt, the two answers
LEARNERS = ("plain", "dpo", "orpo")


def pairs(shape: Sequence[int], step: int) -> Any:
    import numpy as np

    from finetune.data.rows import Example

    random, made = np.random.default_rng(step), []
    for row in range(PAIRS):
        prompt, both = random.integers(3, BASE.vocab, shape[0]), []
        for count in shape[1:][:: 1 if row % 2 else -1]:
            tokens = np.array([*prompt, *random.integers(3, BASE.vocab, count)], np.int32)
            weights = (np.arange(len(tokens)) >= shape[0]).astype(np.float32)
            both.append(Example(tokens, weights, f"row {row}", "", "", shape[0], len(tokens)))
        made.append(replace(both[0], rejected=both[1]))
    return made


def child(learner: str, shape: str, backend: str, folder: Path) -> dict[str, int]:
    """One run in this process."""
    import finetune.run  # noqa: F401  (all that `finetune train` has loaded by then)
    from backends import registry
    from backends.interface import OptimSpec
    from finetune.evaluation.evaluate import base_weights
    from finetune.evaluation.pair_losses import DPO, ORPO
    from finetune.evaluation.pairs import referred, scored_pairs
    from finetune.events import result_of
    from finetune.training.objective import Imitation, Objective, Preference

    peaks, steps = Peaks(), [pairs(SHAPES[shape], step) for step in range(STEPS)]
    session = registry.open_session(backend, *specs(BASE, folder), OptimSpec(), 0)
    peaks.end("load")
    objective: Objective = Imitation()
    if learner == "plain":
        steps = [[side for pair in rows for side in (replace(pair, rejected=None), pair.rejected)] for rows in steps]
    else:
        objective = Preference(DPO(0.1) if learner == "dpo" else ORPO(0.1))
    if learner == "dpo":
        with base_weights(session):
            steps = [referred(rows, result_of(scored_pairs(session, rows, 4096, ""))) for rows in steps]
        peaks.end("references")
    for rows in steps:
        objective.step(session, rows, objective.batches(rows, 4096, session.shares_prefixes), 1e-3)
    peaks.end("steps")
    return peaks.found


def measured(*given: str) -> dict[str, int]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.pair_memory", "--child", *given]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{given}:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(chosen: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_model(BASE, Path(place))
        for backend in [name for name in BACKENDS if name in chosen] or BACKENDS:
            for shape in [name for name in SHAPES if name in chosen] or SHAPES:
                peaks = {learner: measured(learner, shape, backend, place) for learner in LEARNERS}
                plain = max(peaks["plain"].values())
                for learner, found in peaks.items():
                    most = max(found.values())
                    phases = ", ".join(f"{phase} {bytes_ / 1e6:,.0f}" for phase, bytes_ in found.items())
                    print(
                        f"{backend:6}{shape:14}{SHAPES[shape]!s:16}{learner:6}{most / plain:5.2f}x {phases} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:5], Path(sys.argv[5]))))
    else:
        main(sys.argv[1:])
