"""Is an average over the steps better than the last one? A rate that stays, and averages of several powers beside it.

    python tests/benchmarks/averages.py --data FOLDER --set sst2 --rate 1e-3 [--powers 3 5 7] [--epochs 6] [--seed 0]

The sets are those of auto.py, FOLDER is that of tests/real/real_data.py. Prints one JSON line for each epoch: loss and
accuracy on the validation rows and on the test rows, of the last step and of the average with each power.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from auto import SIZES, job_of
from rates import NeverSaves

from finetune.data.rows import Split
from finetune.disk.checkpoint import Checkpoints
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.evaluate import evaluate
from finetune.events import StepDone, result_of
from finetune.recipe.schedule import make_plan
from finetune.training.average import POWER, Average
from finetune.training.head_first import head_first

BESIDE = ("evaluate.base=false", "evaluate.forgetting=false", "train.schedule=constant", "train.early_stopping=99")


def followed(asked: argparse.Namespace, folder: Path) -> None:
    settings = [f"model.path={asked.model}", *BESIDE, *asked.set_key]
    job = job_of(asked.set, asked.data.absolute(), folder, asked.seed, asked.rows, settings)
    session = job.open()
    result_of(head_first(job, session, RunFolder(folder)))
    recipe = job.recipe.with_train(learning_rate=asked.rate, epochs=asked.epochs)
    trainer = NeverSaves(session, job.prepared, recipe, Checkpoints(Path(), {}))
    open_end = make_plan(recipe.with_train(epochs="auto"), len(job.prepared.train.examples))
    averages = {power: Average(open_end, recipe.method) for power in asked.powers}
    for power, one in averages.items():
        one.power = power

    def figures() -> list[Any]:
        def of(split: Split) -> list[float | None]:
            found = result_of(evaluate(session, job.prepared, split, name="", micro_tokens=recipe.train.tokens_at_once))
            return [round(found.loss, 3), found.accuracy and round(found.accuracy, 3)]

        return [of(split) for split in job.prepared.splits if split is not job.prepared.train]

    for event in trainer.events():
        if not isinstance(event, StepDone):
            continue
        for one in averages.values():
            one.follow(event.step, session)
        if trainer.plan.ends_epoch(event.step):
            told: dict[str, Any] = {"epoch": event.step // trainer.plan.steps_per_epoch, "last step": figures()}
            for power, one in averages.items():
                with one.within(session):
                    told[f"power {power}"] = figures()
            print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", choices=SIZES, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--powers", type=int, nargs="+", default=[POWER])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="to train on, at most")
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--set-key", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        followed(asked, Path(folder))


if __name__ == "__main__":
    main()
