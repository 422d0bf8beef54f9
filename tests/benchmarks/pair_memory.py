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

from tests.benchmarks.memory import BASE, Peaks, examples, read_first, specs, write_model

PAIRS, STEPS = 8, 2
BACKENDS = ("torch", "mlx")
SHAPES = {"chat": (256, 64, 96), "short prompts": (24, 160, 200), "long": (512, 160, 200)}  # prompt, the two answers
LEARNERS = ("plain", "dpo", "orpo")


def child(learner: str, shape: str, backend: str, folder: Path) -> dict[str, int]:
    """One run in this process."""
    import finetune.run  # noqa: F401  (all that `finetune train` has loaded by then)
    from backends import registry
    from backends.interface import OptimSpec

    length, *answers = SHAPES[shape]
    case = replace(BASE, rows=PAIRS, length=length, answers=tuple(answers), loss=learner)
    peaks, steps = Peaks(), [examples(case, step) for step in range(STEPS)]
    session = registry.open_session(backend, *specs(BASE, folder), OptimSpec(), 0)
    peaks.end("load")
    if learner == "plain":
        case = replace(case, answers=())
        steps = [[side for pair in rows for side in (replace(pair, rejected=None), pair.rejected)] for rows in steps]
    objective, steps = read_first(case, session, steps)
    peaks.end("references")
    for rows in steps:
        objective.step(session, rows, objective.batches(rows, case.micro_tokens, session.shares_prefixes), 1e-3)
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
