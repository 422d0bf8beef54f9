"""Is forgetting said where it is planted, and only there? Demo runs with many seeds, one of each kind a seed.

    python -m tests.benchmarks.forgetting --seeds 20 --rows 600 --backend torch [--cases default,planted,gentle]

Default: the demo's recipe. Planted: ten times its learning rate, ten epochs, rows of one label. Gentle: the rate and
the epochs of a recipe that names none. Prints a line a run, and the counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune.disk.run_folder import create
from finetune.evaluation.forgetting import Forgetting
from finetune.events import Progress, Work
from finetune.recipe.load import load_recipe
from finetune.run import Run
from tests.unit.toy_run import load_job

ROOT = Path(__file__).parents[2]
ANALYSIS = ("errors: general text", "errors: its own answers")  # what the progress says of it
REVIEWS = ROOT / "finetune" / "assets" / "reviews" / "train.jsonl"


def measured(settings: dict[str, Any], output: Path) -> tuple[Forgetting | None, float]:
    """Of one run of the demo's recipe with these settings; and the share of its time that the analysis took."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(ROOT / "configs" / "demo.yaml", [*overrides, f"output={output}"])
    start = last = time.perf_counter()
    spent = 0.0
    work = Work(Run(load_job(recipe), create(recipe, "forgetting")).events())
    for event in work:
        now = time.perf_counter()
        spent += (now - last) * (isinstance(event, Progress) and event.what.startswith(ANALYSIS))
        last = now
    analysis = work.result.analysis
    return analysis and analysis.forgetting, spent / (time.perf_counter() - start)


def one_label(folder: Path, rows: int) -> Path:
    """All positive but one, since a label alone is no choice."""
    reviews = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    positive = [row for row in reviews if row["label"] == "positive"][: rows - 1]
    negative = [row for row in reviews if row["label"] == "negative"][:1]
    file = folder / "one_label.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*positive, *negative]), encoding="utf-8")
    return file


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--rows", type=int, default=600)
    arguments.add_argument("--planted-rows", type=int, default=96)
    arguments.add_argument("--backend", default="torch")
    arguments.add_argument("--cases", default="default,planted,gentle")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        planted = one_label(Path(folder), given.planted_rows)
        said = dict.fromkeys(given.cases.split(","), 0)
        for seed in range(given.first, given.first + given.seeds):
            shared = {"seed": seed, "backend": given.backend}
            few = {"data.limit": given.rows}
            cases = {
                "default": shared | few,
                "planted": shared | {"data.train": planted, "train.learning_rate": 0.02, "train.epochs": 10},
                "gentle": shared | few | {"train.learning_rate": 2e-4, "train.epochs": 3, "train.schedule": "linear"},
            }
            for name, settings in cases.items():
                if name not in given.cases.split(","):
                    continue
                found, share = measured(settings, Path(folder) / "runs")
                said[name] += found is not None and found.verdict == "forgot"
                told = found and f"p = {found.p_value}, {found.p_more}. {found.message}"
                print(f"seed {seed} {name}: {told} {share:.1%} of the time", flush=True)
        print(f"said of {given.seeds}: {said}")


if __name__ == "__main__":
    main()
