"""Plant wrong labels in real rows, train, and measure what `finetune suspects` finds of them.

    python tests/real/suspects.py --data FOLDER [--sets reviews,sst2] [--rows 600] [--flips 0.05] [--seeds 5]
        [--prove MINUTES] [--set train.epochs=2 ...] [--out FOLDER]

FOLDER of --data is that of real_data.py. Printed for each seed: the area under the ROC curve of the doubts, the share
of the flips among the worst tenth of the rows, how many suspects there are and how many of them are flips, the share of
planted contradictions and near duplicates that are listed, and the seconds against the run's.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import lines_of
from ruamel.yaml import YAML

REVIEWS = Path(__file__).parents[2] / "finetune" / "assets" / "reviews"
HELD_OUT = 200  # test rows, and as many validation rows where there are so many
CLASHES = 10  # rows that are planted again under the other label: half the same, half nearly
Rows = list[dict[str, str]]


def reviews(data: Path) -> tuple[Rows, Rows, Rows]:
    train, valid, test = (
        list(map(json.loads, lines_of(REVIEWS / f"{part}.jsonl"))) for part in ("train", "valid", "test")
    )
    return train, valid, test


def sst2(data: Path) -> tuple[Rows, Rows, Rows]:
    splits = []
    for part in ("train", "dev", "test"):
        lines = lines_of(data / "sst2" / f"stsa.binary.{part}")
        rows = [{"text": line[2:].strip(), "label": ("negative", "positive")[int(line[0])]} for line in lines]
        random.Random(5).shuffle(rows)
        splits.append(rows)
    train, valid, test = splits
    return train, valid, test


SETS = {"reviews": reviews, "sst2": sst2}


def plant(rows: Rows, share: float, seed: int) -> tuple[Rows, set[int], set[int]]:
    """(rows, lines of flips, lines of clashes): some with the other label, and some again under the other label."""
    draw = random.Random(seed)
    labels = sorted({row["label"] for row in rows})
    flips = set(draw.sample(range(len(rows)), round(share * len(rows))))
    made = [row | {"label": _other(row["label"], labels)} if i in flips else row for i, row in enumerate(rows)]
    long = [i for i in range(len(rows)) if i not in flips and len(rows[i]["text"].split()) >= 15]
    chosen = draw.sample(long, CLASHES)
    for number, i in enumerate(chosen):
        text = rows[i]["text"]
        nearly = f"{text} indeed" if number % 2 else text
        made.append({"text": nearly, "label": _other(rows[i]["label"], labels)})
    clashes = {*chosen, *range(len(rows), len(made))}
    return made, {line + 1 for line in flips}, {line + 1 for line in clashes}


def _other(label: str, labels: Sequence[str]) -> str:
    return labels[1 - labels.index(label)]


def write(folder: Path, splits: dict[str, Rows]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"path": "builtin:reviews-base"},
        "data": {name: f"{name}.jsonl" for name in splits} | {"format": "classification"},
        "prompt": {"template": "{text}\n\nThis review is", "completion": " {label}"},
        "train": {"epochs": 3, "learning_rate": 2e-3, "max_length": 128},
        "backend": "torch",
    }
    with (folder / "recipe.yaml").open("w", encoding="utf-8") as target:
        YAML(typ="safe").dump(recipe, target)
    return folder / "recipe.yaml"


def command(*words: str) -> tuple[str, float]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "finetune", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"finetune {' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout, time.monotonic() - began


def doubts(run: Path) -> tuple[list[int], list[float], float]:
    """(line, doubt) of every training row, and the seconds that finding them took; in this process."""
    from finetune.begin import begin

    begin()
    from finetune.check.suspects import find_suspects, rows_judged
    from finetune.disk.adapter import read_adapter
    from finetune.disk.run_folder import open_existing
    from finetune.events import result_of
    from finetune.report.report import load_evaluation
    from finetune.training.job import making_ready

    opened, recipe = open_existing(run)
    job = result_of(making_ready(recipe, None, opened.path))
    session = job.open(read_adapter(opened.adapter))
    tuned = load_evaluation(opened.evaluation("tuned"))
    assert tuned is not None
    began = time.monotonic()
    _, scores = result_of(find_suspects(session, job.prepared, recipe.train.tokens_at_once, tuned.accuracy))
    lines = [int(example.location.rsplit(":", 1)[1]) for example in rows_judged(job.prepared)]
    return lines, scores, time.monotonic() - began


def measure(name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    train, valid, test = SETS[name](asked.data)
    rows, flips, clashes = plant(train[: asked.rows], asked.flips, seed)
    folder = asked.out / f"{name}-{asked.flips:g}-{seed}"
    splits = {"train": rows, "valid": valid[:HELD_OUT], "test": test[:HELD_OUT]}
    recipe = write(folder, splits)
    run = next((folder / "runs").glob("recipe-*/report.json"), None)
    if run is None:
        command("train", str(recipe), f"output={folder / 'runs'}", f"seed={seed}", *asked.set)
        run = next((folder / "runs").glob("recipe-*/report.json"))
    events = [json.loads(line) for line in (run.parent / "metrics.jsonl").open(encoding="utf-8")]
    lines, scores, seconds = doubts(run.parent)
    prove = ["--prove", str(asked.prove)] if asked.prove else []
    said, _ = command("suspects", str(run.parent), *prove)
    with (run.parent / "suspects.csv").open(encoding="utf-8", newline="") as source:
        listed = {int(row["row"].rsplit(":", 1)[1]) for row in csv.DictReader(source)}
    ranked = [line for _, line in sorted(zip(scores, lines, strict=True), reverse=True)]
    wrong = np.isin(lines, [*flips])
    score = np.array(scores)
    return {
        "set": name,
        "seed": seed,
        "rows": len(rows),
        "accuracy": json.loads(run.read_text(encoding="utf-8"))["tuned"]["accuracy"],
        "auc": float((score[wrong][:, None] > score[~wrong][None]).mean()) if flips else None,
        "worst_tenth": len(flips & {*ranked[: len(rows) // 10]}) / len(flips) if flips else None,
        "suspects": len(listed),
        "flips_listed": len(flips & listed),
        "clashes_listed": len(clashes & listed) / len(clashes),
        "seconds": seconds,
        "training_seconds": sum(one["seconds"] for one in events if one["event"] in ("StepDone", "Validated")),
        "proof": [line for line in said.splitlines() if line.startswith("Proof")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", default="reviews,sst2")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--flips", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--prove", type=float)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to every recipe")
    parser.add_argument("--out", type=Path, default=Path("suspects"))
    asked = parser.parse_args()
    for name in asked.sets.split(","):
        for seed in range(asked.first, asked.first + asked.seeds):
            print(json.dumps(measure(name, seed, asked)), flush=True)


if __name__ == "__main__":
    main()
