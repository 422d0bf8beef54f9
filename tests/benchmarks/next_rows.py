"""Are rows that `finetune next` chooses worth more than rows drawn blindly, and is `finetune curve` right?

    python tests/benchmarks/next_rows.py --data FOLDER [--sets reviews ...] [--first 100] [--rounds 3] [--seeds 1]
        [--epochs 6] [--rate 3e-3] [--words] [--curve] [--model PATH] [--set KEY=VALUE ...]

Prints one JSON line for each seed: the accuracy on the test rows after each round of 50 rows, chosen; after as many
that are drawn; and after 1.3 times as many that are drawn. Every model begins from the base. With --curve instead: the
accuracies after a quarter, a half and all of `--first` rows, the interval foretold for twice as many, and what those
gave. --words: naive Bayes on the words stands in for the model, which takes seconds and shows the choice alone. FOLDER
is that of tests/real/real_data.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rates import SETS, job_of, trained

from backends.interface import Session, TrainState
from finetune.check.next_rows import new_rows, next_rows
from finetune.data.rows import Prepared, Split
from finetune.evaluation.curve import look_ahead
from finetune.evaluation.evaluate import evaluate_held_out
from finetune.evaluation.opinions import as_sure_as_right
from finetune.evaluation.variety import choose, margins
from finetune.evaluation.words import WordCounts
from finetune.events import result_of
from finetune.training.job import Job

EACH = 50  # rows of a round
VALID = 100  # validation rows, where there are test rows beside them
Rows = NDArray[np.int64]


@dataclass
class Learner:
    """A model that is trained from the base on some rows of the pool, and judges the others."""

    job: Job
    train: dict[str, Any]
    words: bool

    def __post_init__(self) -> None:
        self.pool = self.job.prepared.train.examples
        self.session: Session | None = None if self.words else self.job.open()
        self.start: TrainState | None = self.session.get_state() if self.session else None

    def with_rows(self, rows: Sequence[int]) -> Prepared:
        chosen = tuple(self.pool[i] for i in rows)
        prepared = replace(self.job.prepared, train=replace(self.job.prepared.train, examples=chosen), parted=False)
        if prepared.test is None:
            return prepared
        return replace(prepared, valid=replace(prepared.valid, examples=prepared.valid.examples[:VALID]))

    def wrong(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Trains on these rows: 1 for each test row that it then gets wrong. [n]"""
        prepared = self.with_rows(rows)
        held_out = prepared.held_out.examples
        if self.session is None or self.start is None:
            self.counts = WordCounts(prepared.train.examples, prepared.labels)
            said = self.counts.logprobs(held_out).argmax(axis=1).tolist()
            return np.array([float(self.counts.labels[i] != row.answer) for i, row in zip(said, held_out, strict=True)])
        job = replace(self.job, prepared=prepared)
        trained(job, self.session, self.start, **self.train)
        made = result_of(evaluate_held_out(self.session, job.recipe, prepared, job.tokenizer, "tuned"))
        return np.array([float(not row.correct) for row in made.results])

    def choice(self, rows: Sequence[int], accuracy: float) -> list[int]:
        """The next rows by the model that was just trained on these."""
        rest = sorted(set(range(len(self.pool))) - set(rows))
        examples, before = tuple(self.pool[i] for i in rest), self.with_rows(rows)
        if self.session is not None:
            asked = replace(self.job.prepared, test=Split("test", len(rest), examples))
            made = result_of(next_rows(self.session, self.job.recipe, asked, before, accuracy, EACH))
            return [rest[one.number] for one in made]
        new = new_rows(examples, before)
        said = margins(as_sure_as_right(self.counts.logprobs([examples[i] for i in new]), accuracy))
        known = [row.prompt for row in before.train.examples]
        return [rest[new[i]] for i in choose(said, [examples[i].prompt for i in new], known, EACH)]


def rounds(learner: Learner, order: Rows, first: int, count: int) -> dict[str, list[float]]:
    """The accuracy after each round, of three ways to get rows."""
    rows, made = order[:first].tolist(), dict[str, list[float]](chosen=[], drawn=[], drawn_more=[])
    right = 1 - learner.wrong(rows).mean()
    for number in range(1, count + 1):
        rows = [*rows, *learner.choice(rows, right)]
        for way, some in (
            ("drawn", order[: first + EACH * number].tolist()),
            ("drawn_more", order[: round(1.3 * (first + EACH * number))].tolist()),
            ("chosen", rows),
        ):
            right = float(1 - learner.wrong(some).mean())
            made[way].append(round(right, 4))
    return made


def curve(learner: Learner, order: Rows, whole: int) -> dict[str, Any]:
    *seen, twice = (learner.wrong(order[:rows].tolist()) for rows in (whole // 4, whole // 2, whole, 2 * whole))
    ahead = look_ahead(seen)
    told = {"measured": [round(1 - cost, 4) for cost in ahead.costs], "says": ahead.answer}
    real = float(twice.mean())
    told["foretold"] = [round(1 - ahead.high, 4), round(1 - ahead.low, 4)]
    return told | {"twice": round(1 - real, 4), "right": bool(ahead.low <= real <= ahead.high)}


def lines(asked: argparse.Namespace, name: str, out: Path) -> Iterator[dict[str, Any]]:
    settings = [f"model.path={asked.model}", f"data.limit={asked.rows}", "evaluate.forgetting=false", *asked.set]
    job = job_of(name, asked.data.absolute(), out, settings)
    learner = Learner(job, {"learning_rate": asked.rate, "epochs": asked.epochs, "early_stopping": None}, asked.words)
    for seed in range(asked.seeds):
        order = np.random.default_rng(seed).permutation(len(learner.pool))
        told = curve(learner, order, asked.first) if asked.curve else rounds(learner, order, asked.first, asked.rounds)
        yield {"set": name, "seed": seed, "first": asked.first, "test": len(job.prepared.held_out.examples)} | told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["reviews"])
    parser.add_argument("--rows", type=int, default=2000, help="of each split at most")
    for option, default in (("--first", 100), ("--rounds", 3), ("--seeds", 1), ("--epochs", 6)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--words", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    for name in asked.sets:
        with tempfile.TemporaryDirectory() as out:
            for line in lines(asked, name, Path(out)):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
