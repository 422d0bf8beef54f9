"""Predicted and measured time of small runs: `python -m tests.benchmarks.predicted_time [backend ...] [case ...]`.

Each case is a run of its own process, on the embedded base and its reviews. What `plan` would predict is what the run
predicts before its loaded model was seen to take so many times as long; both stand in the table. `--processor` counts
seconds of the processor of one thread in the place of the clock's, for a machine that others use too. By the clock, a
run is made again, twice at most, where a virtual machine's host took more than QUIET of the processors' time; of
several the one counts from which it took least.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.disk.metrics import read
from finetune.report.run_times import Times

ROOT = Path(__file__).parents[2]
BACKENDS = ("torch", "mlx")
PROCESSOR = "--processor"
QUIET, TRIES = 0.02, 3
RUN = """
import sys, time
if {processor}:
    time.perf_counter = time.monotonic = time.process_time
from finetune.training import predicted_time
def said(name):
    before = getattr(predicted_time, name)
    def timed(*arguments):
        factor = before(*arguments)
        print(name, factor or 0.0, flush=True)
        return factor
    setattr(predicted_time, name, timed)
said("timed")
said("timed_steps")
from finetune.cli import main
main()
"""
SHARED = "Is the review positive or negative? Read it to its end, as many change their mind on the way. " * 8
LORA: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "labels, rate by a race": {"train": {"learning_rate": "auto", "epochs": 6}},
    "labels, 4 bits, dropout": {"quantize": "4bit", "lora": LORA | {"dropout": 0.05}},
    "labels, long rows": {"rows": "long"},
    "labels, a part of the layers": {"lora": LORA | {"layers": 2, "targets": ["q_proj", "v_proj"]}},
    "text": {"rows": "text"},
    "text, 4 bits, small steps": {"rows": "text", "quantize": "4bit", "train": {"batch_size": 2, "epochs": 1}},
    "labels, epochs by the loss": {"train": {"epochs": "auto"}},
    "labels, a head": {"head": {}},
    "labels, every weight": {"method": "full", "train": {"learning_rate": 1e-4, "epochs": 2}},
    "labels, a shared prompt": {"prompt": {"template": f"{SHARED}{{text}}\n\nIt is", "completion": " {label}"}},
    "pairs of answers": {"rows": "pairs", "preferences": {}, "train": {"epochs": 1}},
    "chats": {"rows": "chats", "train": {"epochs": 2}},
}


def rows(kind: str) -> list[dict[str, Any]]:
    """Reviews with their labels; six joined, with the last one's; or halves of reviews to go on with, also beside
    another review's half, and as chats of two answers.
    """
    file = ROOT / "finetune" / "assets" / "reviews" / "train.jsonl"
    reviews = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if kind == "labels":
        return reviews[:300]
    if kind == "long":
        joined = [" ".join(one["text"] for one in reviews[i : i + 6]) for i in range(0, 240, 2)]
        return [{"text": text, "label": reviews[i]["label"]} for i, text in zip(range(5, 245, 2), joined, strict=True)]
    parted = [one["text"].split() for one in reviews[:200]]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in parted]
    if kind == "text":
        return [{"prompt": first, "completion": second} for first, second in halves]
    if kind == "pairs":
        return [
            {"prompt": first, "chosen": second, "rejected": wrong}
            for (first, second), (_, wrong) in itertools.pairwise(halves)
        ]
    return [{"messages": [*turns(*one), *turns(*two)]} for one, two in itertools.pairwise(halves)]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def recipe(case: str, folder: Path) -> Path:
    asked = dict(CASES[case])
    kind = asked.pop("rows", "labels")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(kind)), encoding="utf-8")
    train = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "max_length": 512} | asked.pop("train", {})
    whole = {
        "model": {"path": "builtin:reviews-base"}, "data": {"train": "rows.jsonl", "valid_fraction": 0.2},
        "lora": LORA, "train": train, "evaluate": {"max_tokens": 16}, **asked,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


def measured(case: str, backend: str, processor: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds of each part, and how many times as long as predicted its loaded model took to read rows and to train."""
    with tempfile.TemporaryDirectory() as name:
        file = recipe(case, Path(name))
        command = [sys.executable, "-c", RUN.format(processor=processor)]
        command += ["train", str(file), "--no-supervisor", "--backend", backend]
        threads = {"OMP_NUM_THREADS": "1"} if processor else {}
        here = os.environ | threads | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=name, env=here, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        slower = {
            words[0]: float(words[1])
            for line in done.stdout.splitlines()
            if (words := line.split())[:1] and words[0].startswith("timed")
        }
        (run,) = Path(name).glob("runs/*")
        times = Times(**json.loads((run / "time.json").read_text(encoding="utf-8")))
        return asdict(times.of_events(read(run / "metrics.jsonl"))), slower


def ticks() -> tuple[int, int]:
    """Of all processors since the machine's start: in use, and kept from us by its host. Nothing off Linux."""
    if not (file := Path("/proc/stat")).exists():
        return 0, 0
    user, nice, system, _, _, irq, softirq, stolen = map(int, file.read_text(encoding="utf-8").split()[1:9])
    return user + nice + system + irq + softirq, stolen


def quietly(case: str, backend: str, processor: bool) -> tuple[float, dict[str, Any], dict[str, float]]:
    """The share of its time that the host took, and what `measured` says."""
    made = []
    for _ in range(1 if processor else TRIES):
        used, stolen = ticks()
        found = measured(case, backend, processor)
        here, there = ticks()
        made.append(((there - stolen) / max(here - used + there - stolen, 1), *found))
        if made[-1][0] <= QUIET:
            break
    return min(made, key=lambda one: one[0])


def lines(case: str, backend: str, processor: bool) -> list[str]:
    stolen, times, slower = quietly(case, backend, processor)
    both = [part for part in times["predicted"] if part in times["measured"]]
    predicted, taken = (sum(times[key][part] for part in both) for key in ("predicted", "measured"))
    reading = slower.get("timed", 1.0)
    training = slower.get("timed_steps") or reading
    plan = {part: times["predicted"][part] / (training if part == "training" else reading) for part in both}
    named = ", ".join(f"{part} {times['measured'][part]:.1f} / {plan[part]:.1f}" for part in both)
    figures = (taken, sum(plan.values()), predicted)
    share = (f"{predicted / taken - 1:+.0%}", f"{stolen:.1%}")
    return [backend, case, *(f"{value:.1f}" for value in figures), *share, named]


def main(arguments: Sequence[str]) -> None:
    chosen = [name for name in arguments if name != PROCESSOR]
    backends = [name for name in BACKENDS if name in chosen] or list(BACKENDS)
    cases = [name for name in CASES if name in chosen] or list(CASES)
    made = []
    for case in cases:
        for backend in backends:
            made.append(lines(case, backend, PROCESSOR in arguments))
            print(*made[-1], sep="; ", file=sys.stderr, flush=True)
    heads = [
        "backend",
        "case",
        "measured, s",
        "by plan",
        "by the run",
        "difference",
        "host took",
        "parts: measured / by plan",
    ]
    for row in (heads, ["---"] * len(heads), *made):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
