"""Is a search within a budget as good as a whole grid? Each setting of a grid as a run of its own, then one search.

    python tests/benchmarks/searches.py FOLDER grid [--settings 0 1 2 ...]   # 4 rates x 2 numbers of epochs, or some
    python tests/benchmarks/searches.py FOLDER search [--share 0.4]          # within that share of the grid's time

Prints one JSON line for each run and appends it to FOLDER/runs.jsonl: its settings, its lowest validation loss, seconds
by the clock (starts and both measurements counted) and of the processor. The rows are the built-in reviews, of which
`--rows` are trained on. A grid may be made in parts; the search takes those that are there.
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

RECIPE = """\
model: {{path: builtin:reviews-base}}
data: {{train: "builtin:reviews/train.jsonl", valid: "builtin:reviews/valid.jsonl", test: "builtin:reviews/test.jsonl",
  limit: {rows}}}
lora: {{rank: 16, alpha: 32, dropout: 0.05}}
train: {{epochs: auto, learning_rate: auto, early_stopping: 2}}
evaluate: {{forgetting: false}}
backend: torch
"""
RATES, EPOCHS = (7e-4, 1.5e-3, 3e-3, 6e-3), (3, 6)


def timed(*command: str) -> dict[str, float]:
    """Runs finetune; seconds by the clock, and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "finetune", *command], check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began, 1), "cpu": round(cpu, 1)}


def trained(folder: Path, rate: float, epochs: int) -> dict[str, Any]:
    out = folder / f"{rate:g}-{epochs}"
    settings = [f"train.learning_rate={rate:g}", f"train.epochs={epochs}"]
    taken = timed("train", str(folder / "recipe.yaml"), *settings, f"output={out}")
    (report,) = out.glob("*/report.json")
    losses = [validation["loss"] for validation in json.loads(report.read_text())["validations"]]
    return {"run": " ".join(settings), "loss": min(losses)} | taken


def searched(folder: Path, share: float, grid: list[dict[str, Any]]) -> dict[str, Any]:
    budget = share * sum(line["seconds"] for line in grid)
    taken = timed(
        "search", str(folder / "recipe.yaml"), "--budget", f"{budget:.0f}s", f"output={folder / f'search-{share:g}'}"
    )
    (path,) = (folder / f"search-{share:g}").glob("*/search.json")
    ledger = json.loads(path.read_text())
    lowest = min(lap["loss"] for lap in ledger["laps"] if lap["finished"] and lap["loss"] is not None)
    (winner,) = {lap["loss"] for lap in ledger["laps"] if lap["trial"] == ledger["winner"] and lap["finished"]}
    trials = {"others": ledger["plan"]["others"], "skipped": len(ledger["skipped"]), "spent": ledger["spent"]}
    best = min(line["loss"] for line in grid)
    return {"run": "search", "budget": round(budget), "loss": winner, "lowest": lowest, "grid": best} | trials | taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("grid", "search"))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--settings", type=int, nargs="*", default=range(len(RATES) * len(EPOCHS)))
    parser.add_argument("--share", type=float, default=0.4)
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(rows=asked.rows))
    runs = folder / "runs.jsonl"
    with runs.open("a+") as kept:
        kept.seek(0)
        grid = [line for line in map(json.loads, kept) if line["run"] != "search"]
        settings = list(product(RATES, EPOCHS))
        of_grid = (trained(folder, *settings[i]) for i in asked.settings)
        for made in of_grid if asked.what == "grid" else [searched(folder, asked.share, grid)]:
            print(line := json.dumps(made), flush=True)
            kept.write(line + "\n")
            kept.flush()


if __name__ == "__main__":
    main()
