"""Do `auto` and a search reach a whole grid's best? Each setting as a run of its own, the recipe as it is, one search.

    python tests/benchmarks/searches.py FOLDER grid --set sst2 --data DATA [--settings 0 1 2 ...] [--seed 0]
    python tests/benchmarks/searches.py FOLDER auto --set sst2 --data DATA      # the recipe that `init` writes
    python tests/benchmarks/searches.py FOLDER search [--share 0.4] ...         # within that share of the grid's time
    python tests/benchmarks/searches.py FOLDER table                            # all that FOLDER holds, a line for each

Prints one JSON line for each run and appends it to FOLDER/runs.jsonl: its settings, its lowest validation loss, its
figures on the test rows, seconds by the clock (starts and both measurements counted) and of the processor. The sets are
those of auto.py, DATA is the folder of tests/real/real_data.py. The grid has four rates, named by --rates, and 3 and 6
epochs, and may be made in parts; a search takes those that are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from auto import SIZES, write_splits
from rates import LENGTHS

EPOCHS = (3, 6)
AUTO = "the recipe as it is"
RECIPE: dict[str, Any] = {
    "lora": {"rank": 16, "alpha": 32, "dropout": 0.05},
    "train": {"epochs": "auto", "learning_rate": "auto", "early_stopping": 2},
    "evaluate": {"base": False, "forgetting": False, "generate": False},
    "backend": "torch",
}


def write_recipe(asked: argparse.Namespace) -> Path:
    """As `finetune init` writes it, but without quantisation: on a CPU that only takes longer."""
    files = write_splits(asked.set, asked.data and asked.data.absolute(), asked.folder, asked.seed, asked.rows)
    data = {split: file.name for split, file in files.items()}
    head = {"head": {}} if asked.set == "banking77" else {}
    train = RECIPE["train"] | {"max_length": LENGTHS.get(asked.set, 256)}
    whole = RECIPE | {"model": {"path": asked.model}, "data": data, "train": train, "seed": asked.seed} | head
    file: Path = asked.folder / "recipe.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


def timed(*command: str) -> dict[str, float]:
    """Runs finetune; seconds by the clock, and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "finetune", *command], check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began, 1), "cpu": round(cpu, 1)}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The lowest validation loss, the epochs made, and what the kept adapter has on the test rows."""
    validations, tuned = report["validations"], report["tuned"]
    return {
        "loss": min(one["loss"] for one in validations),
        "epochs": round(validations[-1]["epoch"], 2),
        "test_loss": tuned["loss"],
        "accuracy": tuned["accuracy"],
    }


def trained(recipe: Path, settings: list[str], name: str) -> dict[str, Any]:
    out = recipe.parent / name
    taken = timed("train", str(recipe), *settings, f"output={out}")
    (report,) = out.glob("*/report.json")
    return {"run": " ".join(settings) or AUTO} | figures(json.loads(report.read_text())) | taken


def searched(recipe: Path, share: float, grid: list[dict[str, Any]]) -> dict[str, Any]:
    out = recipe.parent / f"search-{share:g}"
    budget = share * sum(line["cpu"] for line in grid)  # by the clock, where nothing else runs: use one thread
    taken = timed("search", str(recipe), "--budget", f"{budget:.0f}s", f"output={out}")
    (path,) = out.glob("*/search.json")
    ledger = json.loads(path.read_text())
    (winner,) = {
        stage["loss"] for stage in ledger["stages"] if stage["trial"] == ledger["winner"] and stage["finished"]
    }
    trials = {"others": ledger["others"], "skipped": len(ledger["skipped"]), "spent": ledger["spent"]}
    best = min(line["loss"] for line in grid)
    return {"run": "search", "budget": round(budget), "loss": winner, "grid": best} | trials | taken


def table(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        right = "" if line.get("accuracy") is None else f"{line['accuracy']:.3f}"
        test = "" if line.get("test_loss") is None else f"{line['test_loss']:.3f}"
        named = (line["run"], f"{line['loss']:.4f}", right, test, line.get("epochs", ""), line["seconds"], line["cpu"])
        print("|", " | ".join(map(str, named)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("grid", "auto", "search", "table"))
    parser.add_argument("--set", choices=SIZES, default="reviews")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, help="to train on, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--rates", type=float, nargs=4, default=(7e-4, 1.5e-3, 3e-3, 6e-3))
    parser.add_argument("--settings", type=int, nargs="*", default=range(4 * len(EPOCHS)))
    parser.add_argument("--share", type=float, default=0.4)
    asked = parser.parse_args()
    asked.folder = asked.folder.absolute()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with (asked.folder / "runs.jsonl").open("a+") as kept:
        kept.seek(0)
        known = [json.loads(line) for line in kept]
        if asked.what == "table":
            table(known)
            return
        recipe, each = write_recipe(asked), list(product(asked.rates, EPOCHS))
        if asked.what == "search":
            made = iter([searched(recipe, asked.share, [line for line in known if "train.epochs" in line["run"]])])
        else:
            chosen = [each[i] for i in asked.settings] if asked.what == "grid" else []
            settings = [[f"train.learning_rate={rate:g}", f"train.epochs={count}"] for rate, count in chosen] or [[]]
            made = (trained(recipe, one, "-".join(one).replace("train.", "") or "auto") for one in settings)
        for line in made:
            print(written := json.dumps(line), flush=True)
            kept.write(written + "\n")
            kept.flush()


if __name__ == "__main__":
    main()
