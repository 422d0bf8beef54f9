"""Does the recipe that `init` writes reach the best of a grid of rates and epochs? Six small data sets, several seeds.

    python tests/benchmarks/auto.py --data FOLDER [--sets reviews instruct ...] [--rates 1.5e-3 3e-3 6e-3 auto]
        [--epochs 3 6] [--seeds 0 1 2] [--rows 300] [--model builtin:reviews-base] [--set lora.rank=4 ...]

Prints what rates.py prints, one JSON line for each run. All runs of a data set and seed share one session, set back to
its beginning. A seed says which rows are trained on, too. FOLDER is that of tests/real/real_data.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "real"))
from cases import lines_of
from rates import LENGTHS, RECIPE, print_grid

from finetune.disk.run_folder import RunFolder
from finetune.events import result_of
from finetune.recipe.load import parse_recipe
from finetune.training.head_first import head_first
from finetune.training.job import Job, making_ready

Rows = list[dict[str, Any]]
SIZES: Mapping[str, tuple[int, int, int]] = {  # rows to train on, to validate on, for the figures
    "reviews": (300, 100, 500),
    "sst2": (800, 200, 800),  # of fewer than 90 letters: rows as short as those make cheap runs
    "imdb": (300, 100, 400),
    "banking77": (1200, 200, 800),
    "instruct": (200, 100, 200),
    "shawgpt": (50, 10, 10),
}
LABELS = ("negative", "positive")
REVIEWS = Path(__file__).parents[2] / "finetune" / "assets" / "reviews"


def read(file: Path) -> Rows:
    return [json.loads(line) for line in lines_of(file)]


def pools(name: str, data: Path, seed: int) -> tuple[Rows, Rows, Rows]:
    """All rows that there are for each split, in an order that the seed says for those to train on."""
    if name == "reviews":  # those not trained on are measured too
        train = shuffled(read(REVIEWS / "train.jsonl"), seed)
        return train[:300], read(REVIEWS / "valid.jsonl"), train[300:] + read(REVIEWS / "test.jsonl")
    if name == "shawgpt":
        train, valid, test = (
            read(data / "shawgpt" / f"qlora-mlx_data_{part}.jsonl") for part in ("train", "valid", "test")
        )
        return train, valid, test
    train, valid, test = {"sst2": sst2, "imdb": imdb, "banking77": banking77, "instruct": instruct}[name](data)
    return shuffled(train, 10 * seed), shuffled(valid, 1), shuffled(test, 2)


def sst2(data: Path) -> tuple[Rows, Rows, Rows]:
    train, valid, test = (
        [{"text": line[2:].strip(), "label": LABELS[int(line[0])]} for line in lines if len(line) < 90]
        for lines in (lines_of(data / "sst2" / f"stsa.binary.{part}") for part in ("train", "dev", "test"))
    )
    return train, valid, test


def imdb(data: Path) -> tuple[Rows, Rows, Rows]:
    train, held = (
        [{"text": row["text"], "label": LABELS[row["label"]]} for row in read(data / "imdb" / f"{part}_1000.jsonl")]
        for part in ("train", "test")
    )
    held = shuffled(held, 0)
    return train, held[:200], held[200:]


def banking77(data: Path) -> tuple[Rows, Rows, Rows]:
    train, test = (
        [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file.open(encoding="utf-8"))]
        for file in (data / "banking77" / "train.csv", data / "banking77" / "test.csv")
    )
    train = shuffled(train, 0)
    return train[400:], train[:400], test


def instruct(data: Path) -> tuple[Rows, Rows, Rows]:
    rows = shuffled(json.loads((data / "instruct" / "instruction-data.json").read_text(encoding="utf-8")), 0)
    return rows[400:], rows[:120], rows[120:400]


def shuffled(rows: Rows, seed: int) -> Rows:
    rows = [*rows]
    random.Random(seed).shuffle(rows)
    return rows


def write_splits(name: str, data: Path, out: Path, seed: int, rows: int | None) -> dict[str, Path]:
    """Split -> its file. rows: to train on, at most."""
    files = {}
    for split, part, most in zip(("train", "valid", "test"), pools(name, data, seed), SIZES[name], strict=True):
        kept = part[: min(most, rows or most) if split == "train" else most]
        files[split] = out / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return files


def job_of(name: str, data: Path, out: Path, seed: int, rows: int | None, settings: Sequence[str]) -> Job:
    """As `finetune init` writes the recipe, but without quantisation: on a CPU that only takes longer."""
    files = [f"data.{split}={file}" for split, file in write_splits(name, data, out, seed, rows).items()]
    head = ["head={}"] if name == "banking77" else []
    longest = f"train.max_length={LENGTHS.get(name, 256)}"
    return result_of(
        making_ready(parse_recipe(RECIPE, out / "recipe.yaml", [*files, *head, longest, f"seed={seed}", *settings]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, help="to train on, at most")
    parser.add_argument("--rates", nargs="*", default=["7e-4", "1.5e-3", "3e-3", "6e-3", "auto"])
    parser.add_argument("--epochs", nargs="*", default=["3", "6"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    for name, seed in ((name, seed) for name in asked.sets for seed in asked.seeds):
        with tempfile.TemporaryDirectory() as out:
            settings = [f"model.path={asked.model}", *asked.set]
            job = job_of(name, asked.data.absolute(), Path(out), seed, asked.rows, settings)
            session = job.open()
            result_of(head_first(job, session, RunFolder(Path(out))))
            print_grid({"set": name, "seed": seed}, job, session, asked.rates, asked.epochs)


if __name__ == "__main__":
    main()
