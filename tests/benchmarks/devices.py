"""Several processes beside one: `python tests/benchmarks/devices.py FOLDER [--what curve,kills,speed]`.

curve: 100 steps in float32 by 1, 2 and 3 processes, and the same again: losses, bytes. kills: one process of two, at a
random moment; the resumed run must end with the bytes of one that was not killed, and no process may be left. speed:
tokens of workload (b) by one and by two processes of one thread each, per second, and per CPU second of the busiest
process, which tells on a busy machine what two free cores would do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
TINY = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
WAIT = 120.0  # seconds
STEPS, SKIPPED = 10, 2  # of a timed run


def recipe(folder: Path, values: Mapping[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **one, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes], codes: Sequence[int] = (0,)) -> str:
    try:
        _, said = process.communicate(timeout=WAIT)
    except BaseException:
        process.terminate()
        raise
    text = said.decode(errors="replace")
    assert process.returncode in codes, f"exit code {process.returncode}\n{text}"
    return text


def train(file: Path, output: Path, backend: str, count: int) -> Path:
    """The finished run."""
    end(start(["train", str(file), f"output={output}", "--backend", backend, *devices(count)]))
    (run,) = output.iterdir()
    return run


def devices(count: int) -> list[str]:
    return ["--devices", str(count)] if count > 1 else []


def steps(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.get("event") == "StepDone"]


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def tiny(folder: Path, count: int) -> Path:
    """A recipe of so many steps on a tiny random model."""
    from tests.end_to_end.command import reviews
    from tests.tiny_models import model_with_tokenizer

    if not (folder / "model").exists():
        model_with_tokenizer(folder / "model")
        rows = "".join(json.dumps(row) + "\n" for row in reviews(0, 90))
        (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    rates = {"learning_rate": 2e-3, "steps": count, "batch_size": 6, "micro_tokens": 100, "checkpoint_every": 7}
    held = {"every": 20, "forgetting": False}
    values = {"model": {"path": "model", "dtype": "float32"}, "data": {"train": "train.jsonl"}, "train": rates}
    return recipe(folder, values | TINY | {"evaluate": held})


def curve(folder: Path, backend: str) -> None:
    file = tiny(folder, 100)
    runs = {count: train(file, folder / f"{backend}-{count}", backend, count) for count in (1, 2, 3)}
    for count in (2, 3):
        pairs = zip(steps(runs[1]), steps(runs[count]), strict=True)
        worst = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs)
        again = train(file, folder / f"{backend}-{count}-again", backend, count)
        equal = adapter(again) == adapter(runs[count]) and [one["loss"] for one in steps(again)] == [
            one["loss"] for one in steps(runs[count])
        ]
        print(f"{backend}, {count} processes: losses differ by {worst:.1e}; again equal: {equal}", flush=True)
        assert worst < 1e-5 and equal


def kills(folder: Path, backend: str, count: int) -> None:
    file, draw = tiny(folder, 100), random.Random(backend)
    whole, resumed = adapter(train(file, folder / f"{backend}-whole", backend, 2)), 0
    for number in range(count):
        output = folder / f"{backend}-kill-{number}"
        process = start(["train", str(file), f"output={output}", "--backend", backend, *devices(2)])
        members = wait_for_members(process, output, draw.randrange(1, 95))
        victim = draw.choice(members)
        began = time.monotonic()
        victim.kill()
        said = end(process, (1, 5))
        seconds = time.monotonic() - began
        left = [one for one in members if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert not left, left
        (run,) = output.iterdir()
        end(start(["resume", str(run), "--backend", backend, *devices(2)]))
        assert adapter(run) == whole, "other bytes"
        resumed += 1
        print(f"{backend}, kill {number + 1}: ended after {seconds:.1f} s ({said.splitlines()[-1][:60]})", flush=True)
    print(f"{backend}: {resumed} of {count} resumed to the same bytes", flush=True)


def wait_for_members(process: subprocess.Popen[bytes], output: Path, count: int) -> list[psutil.Process]:
    """The processes that train, once metrics.jsonl has so many steps."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until and process.poll() is None:
        done = sum(file.read_bytes().count(b"StepDone") for file in output.glob("*/metrics.jsonl"))
        if done >= count:
            return [one for one in psutil.Process(process.pid).children(recursive=True) if trains(one)]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    raise AssertionError(f"it never did {count} steps: {process.communicate()[1].decode()[-2000:]}")


def trains(process: psutil.Process) -> bool:
    """A child that trains: its supervisor has the same command line."""
    try:
        line, parent = process.cmdline(), process.parent()
        return "train" in line and parent is not None and parent.cmdline()[1:] == line[1:]
    except psutil.Error:
        return False


def speed(folder: Path, backend: str) -> None:
    from tests.benchmarks import workloads

    sys.argv = ["workloads.py", "b-8k", str(folder), "4"]
    workloads.main()
    model, data = workloads.folders(folder, "b-8k", 4)
    rates = {
        "steps": STEPS,
        "batch_size": workloads.WORKLOADS["b-8k"].batch_size,
        "learning_rate": 1e-4,
        "checkpoint_every": 10**9,
        "max_length": 640,
    }
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data / workloads.TRAIN), "valid": str(data / workloads.SHORT)},
        "lora": {"rank": 8, "alpha": 16.0},
        "train": rates,
        "evaluate": {"every": 10**9, "generate": False, "base": False, "forgetting": False},
    }
    file, found = recipe(folder, values), {}
    for count in (1, 2):
        output = folder / f"{backend}-speed-{count}-{time.time_ns()}"
        process = start(["train", str(file), f"output={output}", "--backend", backend, *devices(count)])
        members = wait_for_members(process, output, SKIPPED)
        before = [sum(one.cpu_times()[:2]) for one in members]
        wait_for_members(process, output, STEPS)
        busiest = max(sum(one.cpu_times()[:2]) - began for one, began in zip(members, before, strict=True))
        end(process)
        (run,) = output.iterdir()
        done = steps(run)[SKIPPED:]
        tokens = sum(one["useful_tokens"] for one in done)
        found[count] = statistics.median(one["useful_tokens"] / one["seconds"] for one in done), tokens / busiest
        print(
            f"{backend}, {count} of one thread: {found[count][0]:,.0f} tokens/s; {found[count][1]:,.0f} per CPU second"
        )
    clock, processor = (found[2][i] / found[1][i] for i in range(2))
    print(f"{backend}: two are {clock:.2f} times as fast as one, {processor:.2f} times by CPU time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what", default="curve,kills,speed")
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--kills", type=int, default=10)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    asked.folder.mkdir(parents=True, exist_ok=True)
    for backend in asked.backends.split(","):
        for what in asked.what.split(","):
            if what == "kills":
                kills(asked.folder, backend, asked.kills)
            else:
                {"curve": curve, "speed": speed}[what](asked.folder, backend)


if __name__ == "__main__":
    main()
