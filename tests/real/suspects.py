"""Plant wrong labels in real rows, train, and measure what `finetune suspects` finds of them.

    python tests/real/suspects.py --data FOLDER [--sets reviews sst2] [--rows 600] [--flips 0.05 0.2] [--seeds 5]
        [--prove] [--test 200] [--set train.epochs=2 ...]

FOLDER of --data is that of real_data.py. One JSON line for each set, share of flips and seed: the area under the ROC
curve of the doubts, the share of the flips among the worst tenth of the rows, how many suspects there are and how many
of them are flips, the share of planted contradictions and near duplicates that are listed, and the CPU seconds beside
those of the training. --prove: trained again without the suspects, and the sentence that the command would say. The
accuracy without any flip is that of `--flips 0`. All is done in one process, by the functions of the command.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cases import lines_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from rates import trained

from backends.interface import Session
from finetune.check.retrain import verdict, without_rows
from finetune.check.suspects import find_suspects, rows_judged
from finetune.evaluation.evaluate import evaluate_held_out
from finetune.events import result_of
from finetune.recipe.load import parse_recipe
from finetune.training.job import Job, making_ready
from finetune.training.rate_rule import starting_rate

REVIEWS = Path(__file__).parents[2] / "finetune" / "assets" / "reviews"
VALID = 100  # validation rows
CLASHES = 10  # rows that are planted again under the other label: half the same, half nearly
RECIPE = """
model: {path: "builtin:reviews-base"}
data: {train: train.jsonl, valid: valid.jsonl, test: test.jsonl, format: classification}
prompt: {template: "{text}\\n\\nThis review is", completion: " {label}"}
train: {epochs: auto, max_length: 128}
backend: torch
"""
Rows = list[dict[str, str]]
T = TypeVar("T")


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


def job_of(folder: Path, splits: dict[str, Rows], settings: Sequence[str]) -> Job:
    """The recipe's rate is the rule's where the settings name none."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = result_of(making_ready(parse_recipe(RECIPE, folder / "recipe.yaml", settings)))
    if job.recipe.train.learning_rate != "auto":
        return job
    rate = starting_rate(job.recipe, job.folder, len(job.prepared.train.examples)).rate
    return result_of(making_ready(job.recipe.with_train(learning_rate=rate)))


def timed(work: Generator[Any, None, T]) -> tuple[T, float]:
    """The result, and the CPU seconds that it took."""
    began = time.process_time()
    made = result_of(work)
    return made, round(time.process_time() - began, 1)


def measure(name: str, share: float, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    train, valid, test = SETS[name](asked.data)
    rows, flips, clashes = plant(train[: asked.rows], share, seed)
    with tempfile.TemporaryDirectory() as folder:
        splits = {"train": rows, "valid": valid[:VALID], "test": test[: asked.test]}
        job = job_of(Path(folder), splits, [f"seed={seed}", *asked.set])
        session = job.open()
        start = session.get_state()
        run = trained(job, session, start)
        limit, accuracy = job.recipe.train.tokens_at_once, run["accuracy"]
        (suspects, scores), seconds = timed(find_suspects(session, job.prepared, limit, accuracy))
        told = {"set": name, "flips": share, "seed": seed, "rows": len(rows)}
        told |= {"rate": job.recipe.train.learning_rate, "accuracy": accuracy}
        told |= _found(job, scores, {int(one.location.rsplit(":", 1)[1]) for one in suspects}, flips, clashes)
        told |= {"cpu": seconds, "training_cpu": run["cpu"]}
        if asked.prove:
            whole = result_of(evaluate_held_out(session, job.recipe, job.prepared, job.tokenizer, "tuned"))
            session.set_state(start)
            told |= _proof(job, session, {one.location for one in suspects if one.doubt > 0}, whole)
        return told


def _found(job: Job, scores: list[float], listed: set[int], flips: set[int], clashes: set[int]) -> dict[str, Any]:
    lines = [int(example.location.rsplit(":", 1)[1]) for example in rows_judged(job.prepared)]
    ranked = [line for _, line in sorted(zip(scores, lines, strict=True), reverse=True)]
    wrong, score = np.isin(lines, [*flips]), np.array(scores)
    pairs = score[wrong][:, None] > score[~wrong][None]
    return {
        "auc": round(float(pairs.mean()), 3) if flips else None,
        "worst_tenth": round(len(flips & {*ranked[: len(lines) // 10]}) / len(flips), 3) if flips else None,
        "suspects": len(listed),
        "flips_listed": len(flips & listed),
        "clashes_listed": len(clashes & listed) / len(clashes),
    }


def _proof(job: Job, session: Session, removed: set[str], whole: Any) -> dict[str, Any]:
    began, count = time.process_time(), len(job.prepared.train.examples)
    without = result_of(without_rows(job, session, None, removed, math.inf))
    assert without is not None  # there is no deadline
    said = verdict(count, len(removed), whole, without)
    return {
        "removed": len(removed),
        "without": without.accuracy,
        "proof": said,
        "proof_cpu": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--flips", type=float, nargs="+", default=[0.05])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--prove", action="store_true")
    parser.add_argument("--test", type=int, default=200, help="test rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to every recipe")
    asked = parser.parse_args()
    for name in asked.sets:
        for seed in range(asked.first, asked.first + asked.seeds):
            for share in asked.flips:
                print(json.dumps(measure(name, share, seed, asked)), flush=True)


if __name__ == "__main__":
    main()
