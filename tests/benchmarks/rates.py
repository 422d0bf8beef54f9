"""What learning rate is best, and whether `auto` finds it: a grid of rates and epochs on public data sets, one base.

    python tests/benchmarks/rates.py --data FOLDER [--sets reviews instruct ...] [--rows 500] [--rates 2e-4 1e-3 3e-3]
        [--epochs 3 6] [--model builtin:reviews-base] [--set lora.rank=4 ...]

Prints one JSON line for each run: its rate and epochs, the losses and accuracies of its validations and the training
losses before them, the loss and accuracy on the test rows, and the CPU seconds of training, validations and, for
`auto`, the race. All runs of a data set share one session, set back to its beginning. FOLDER is that of
tests/real/real_data.py. `--rows` bounds every split. Answers are not written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "real"))
from cases import imdb, sst2

from backends.interface import Session, TrainState
from finetune.disk.checkpoint import Checkpoints
from finetune.errors import Diverged
from finetune.evaluation.evaluate import evaluate_held_out
from finetune.events import result_of
from finetune.recipe.load import parse_recipe
from finetune.training.job import Job, making_ready
from finetune.training.loop import Trainer
from finetune.training.rate_race import race, with_rate
from finetune.training.rate_rule import starting_rate

SETS = ("reviews", "sst2", "imdb", "banking77", "instruct", "shawgpt")
LENGTHS = {"sst2": 128, "imdb": 128, "banking77": 128, "shawgpt": 1024}
RECIPE = "lora: {rank: 16, alpha: 32, dropout: 0.05}\ntrain: {early_stopping: 2}\nevaluate: {generate: false}\n"


def files_of(name: str, data: Path, out: Path) -> dict[str, str]:
    """Split -> file, without the splits that are set apart of train."""
    if name == "reviews":
        return {split: f"builtin:reviews/{split}.jsonl" for split in ("train", "valid", "test")}
    if name == "banking77":
        return {split: str(data / "banking77" / f"{split}.csv") for split in ("train", "test")}
    if name == "instruct":
        return {"train": str(data / "instruct" / "instruction-data.json")}
    if name == "shawgpt":
        splits = ("train", "valid", "test")
        return {split: str(data / "shawgpt" / f"qlora-mlx_data_{split}.jsonl") for split in splits}
    made = (sst2 if name == "sst2" else imdb)(data, out)
    return {split: str(file) for split, file in made.items()}


def job_of(name: str, data: Path, out: Path, settings: Sequence[str]) -> Job:
    """As `finetune init` writes the recipe, but without quantisation: on a CPU that only takes longer."""
    splits = [f"data.{split}={file}" for split, file in files_of(name, data, out).items()]
    columns = ["data.columns.label=category"] if name == "banking77" else []
    longest = f"train.max_length={LENGTHS.get(name, 256)}"
    recipe = parse_recipe(RECIPE, out / "recipe.yaml", [*splits, *columns, longest, *settings])
    return result_of(making_ready(recipe))


def trained(job: Job, session: Session, start: TrainState, **train: Any) -> dict[str, Any]:
    """One run from the start: its figures. The session is afterwards at the run's best validation."""
    session.set_state(start)
    recipe = job.recipe.model_copy(update={"train": job.recipe.train.model_copy(update=train)})
    began, told = time.process_time(), dict[str, Any]()
    if recipe.train.learning_rate == "auto":
        rule = starting_rate(recipe, job.folder, len(job.prepared.train.examples))
        made = result_of(race(session, recipe, job.prepared, rule, recipe.train.tokens_at_once))
        told = {"race": {lap.rate: lap.loss for lap in made.laps}, "chosen": made.chosen, "steps": made.course}
        told["race_cpu"] = round(time.process_time() - began, 1)
        recipe = with_rate(recipe, made)
    trainer = NeverSaves(session, job.prepared, recipe, Checkpoints(Path(), {}))
    try:
        for _ in trainer.events():
            pass
    except Diverged as error:
        return told | {"diverged": str(error)}
    told |= {"cpu": round(time.process_time() - began, 1), "epochs_made": trainer.state.validations[-1].epoch}
    assert trainer.best is not None
    session.set_state(TrainState(0, trainer.best, {}))
    measured = result_of(evaluate_held_out(session, recipe, job.prepared, job.tokenizer, "tuned"))
    validations = trainer.state.validations
    told["kept_epoch"] = trainer.state.best_step / trainer.plan.steps_per_epoch
    told |= {"validation": [round(one.loss, 4) for one in validations], "right": [one.accuracy for one in validations]}
    told["training"] = [one.train_loss and round(one.train_loss, 4) for one in validations]
    return told | {"test_loss": round(measured.loss, 4), "accuracy": measured.accuracy}


def print_grid(
    about: Mapping[str, Any], job: Job, session: Session, rates: Sequence[str], epochs: Sequence[str]
) -> None:
    """A line for each run of the grid, all from the session's state. about: what each line begins with."""
    start = session.get_state()
    rows = {split.name: len(split.examples) for split in job.prepared.splits}
    for rate in rates:
        for count in ["auto"] if rate == "auto" else epochs:
            values = {"learning_rate": rate if rate == "auto" else float(rate)}
            values |= {"epochs": count if count == "auto" else int(count)}
            line = {**about, "rows": rows, "rate": rate, "epochs": count}
            print(json.dumps(line | trained(job, session, start, **values), default=str), flush=True)


class NeverSaves(Trainer):
    """Without checkpoints: their time is no part of what is compared."""

    def _save(self, step: int) -> Iterator[Any]:
        yield from ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rates", nargs="*", default=["2e-4", "1e-3", "3e-3", "auto"])
    parser.add_argument("--epochs", nargs="*", default=["3", "6"])
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    for name in asked.sets:
        with tempfile.TemporaryDirectory() as out:
            settings = [f"model.path={asked.model}", f"data.limit={asked.rows}", *asked.set]
            job = job_of(name, asked.data.absolute(), Path(out), settings)
            session = job.open()
            print_grid({"set": name}, job, session, asked.rates, asked.epochs)


if __name__ == "__main__":
    main()
