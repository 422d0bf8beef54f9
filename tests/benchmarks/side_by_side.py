"""Ourselves and the rivals on the same work: `python tests/benchmarks/side_by_side.py --table FILE.md`.

The same random model, rows, LoRA (rank 8 on every linear) and AdamW steps for everyone; every run is a process
of its own, all contenders one after the other, `--rounds` times. `--list` names workloads and contenders.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import ALL, NOBODY, Contender, chosen
from machine import machine
from meter import Task
from openblas import preload
from tables import report
from workloads import WORKLOADS, folders

HERE = Path(__file__).parent
USUAL = ("a-49k", "a-8k", "b-8k", "b-49k", "c", "d", "layers", "nf4")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", nargs="*", default=USUAL, choices=WORKLOADS, metavar="NAME")
    for side in ("--ours", "--rivals"):
        parser.add_argument(side, nargs="*", default=(), choices=[*ALL, NOBODY], metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of every contender; more where nothing else runs")
    parser.add_argument("--blocks", type=int, default=8, help="of the model: 27 M weights in 8")
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which a run is given up")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "side-by-side", help="models, rows")
    parser.add_argument("--json", type=Path, help="keep every run's figures here; runs already there are added to")
    parser.add_argument("--table", type=Path, help="write the tables here; they are printed in any case")
    parser.add_argument("--list", action="store_true", help="name workloads and contenders, and stop")
    return parser.parse_args()


def environment(threads: int, library: Path | None) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    extra = {"LD_PRELOAD": str(library)} if library else {}
    return {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1", **extra}


def measure(
    contender: Contender, name: str, turn: int, options: argparse.Namespace, library: Path | None
) -> dict[str, Any]:
    """One run's figures, or {"failed": why}."""
    workload = WORKLOADS[name]
    model, data = folders(options.work, name, options.blocks)
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        task = Task(
            contender.settings,
            str(model),
            str(data),
            str(scratch / "out"),
            workload.batch_size,
            workload.steps * workload.epochs,
            options.blocks,
            workload.layers,
            turn,
            time.time(),
        )
        (scratch / "task.json").write_text(json.dumps(asdict(task)))
        command = [sys.executable, str(HERE / contender.worker), str(scratch / "task.json"), str(scratch / "result")]
        surroundings = environment(options.threads, library if contender.blas else None)
        with (scratch / "said").open("w") as said:
            try:
                done = subprocess.run(command, env=surroundings, stdout=said, stderr=said, timeout=options.limit)
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {options.limit:g} s"}
        if done.returncode != 0:
            lines = (scratch / "said").read_text(errors="replace").strip().splitlines()
            return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
        found: dict[str, Any] = json.loads((scratch / "result").read_text())
        return found


def run(options: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Every run of the workloads asked for, added to kept["runs"] as it ends."""
    library = preload(options.work)
    for name in options.workloads:
        earlier = 1 + max((one["round"] for one in kept["runs"] if one["workload"] == name), default=-1)
        make = [sys.executable, str(HERE / "workloads.py"), name, str(options.work), str(options.blocks)]
        subprocess.run(make, check=True, env=environment(options.threads, None))
        contenders = chosen(name, options.ours, options.rivals)
        for turn in range(earlier, earlier + options.rounds):
            for contender in contenders if turn % 2 == 0 else contenders[::-1]:
                reason = contender.missing(with_blas=library is not None)
                if reason and turn > earlier:
                    continue
                found = {"failed": reason} if reason else measure(contender, name, turn, options, library)
                kept["runs"].append({"workload": name, "contender": contender.key, "round": turn} | found)
                print(progress(kept["runs"][-1]), file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(kept))


def progress(found: dict[str, Any]) -> str:
    where = f"{found['workload']}, {found['contender']}, round {found['round'] + 1}"
    if "failed" in found:
        return f"{where}: {found['failed']}"
    steps, useful = found["steps"], sum(step["useful"] for step in found["steps"])
    used = sum(step["cpu"] for step in steps)
    return f"{where}: {useful} tokens in {used:.1f} CPU s, {found['peak'] / 1e6:.0f} MB" + "".join(
        f"; {note}" for note in found["notes"]
    )


def main() -> None:
    options = parsed()
    if options.list:
        for name, workload in WORKLOADS.items():
            print(f"{name:24} {workload.title}, {workload.count} rows in steps of {workload.batch_size}")
        for key, contender in ALL.items():
            print(f"{key:24} {contender.title} [{contender.kind}]{'' if contender.usual else ', only when named'}")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(options.threads), "blocks": options.blocks, "runs": []}
    if options.json and options.json.exists():
        earlier = json.loads(options.json.read_text())
        if any(earlier[name] != kept[name] for name in ("machine", "blocks")):
            raise SystemExit(f"{options.json} holds runs of another machine, other versions or another model")
        kept = earlier
    run(options, kept)
    text = report(kept)
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
