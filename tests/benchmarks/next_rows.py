"""Are rows that `finetune next` chooses worth more than rows drawn blindly, and is `finetune curve` right?

    python tests/benchmarks/next_rows.py --data FOLDER [--sets reviews ...] [--first 100] [--rounds 3] [--seeds 1]
        [--seed 0] [--epochs 6] [--rate 3e-3] [--words | --head] [--curve] [--model PATH] [--set KEY=VALUE ...]

Prints one JSON line for each seed: the accuracy on the test rows after each round of 50 rows, chosen; after as many
that are drawn; and after 1.3 times as many that are drawn. Every model begins from the base. With --curve instead: the
accuracies after a quarter, a half and all of `--first` rows, the interval predicted for twice as many, and what those
gave. Two models stand in for a tuned one where seconds must suffice for many seeds: with --words naive Bayes on the
words; with --head a linear head on the states that the frozen model gives once for each row. FOLDER is that of
tests/real/real_data.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rates import SETS, job_of, trained

from backends.interface import Session, TrainState
from finetune.check.next_rows import new_rows, next_rows, words_say
from finetune.data.rows import Example, Prepared, Split
from finetune.evaluation.diverse_rows import choose, margins
from finetune.evaluation.evaluate import evaluate_held_out
from finetune.evaluation.label_confidence import Floats, as_sure_as_right
from finetune.evaluation.learning_curve import look_ahead
from finetune.evaluation.naive_bayes import WordCounts
from finetune.evaluation.scoring import row_states
from finetune.events import result_of
from finetune.training.head_first import classes_of
from finetune.training.job import Job

EACH = 50  # rows of a round
VALID = 100  # validation rows
RIDGE = 1.0  # times the mean square length of a state: what holds the weights of a head small
Rows = NDArray[np.int64]


@dataclass
class Learner:
    """A model that is trained from the base on some rows of the pool, and judges the others."""

    job: Job
    train: dict[str, Any]

    def __post_init__(self) -> None:
        self.pool = self.job.prepared.train.examples
        self.session: Session | None = None

    def with_rows(self, rows: Sequence[int]) -> Prepared:
        """With VALID rows to validate on. Where there are no test rows, the other validation rows are."""
        whole = self.job.prepared
        chosen, valid = tuple(self.pool[i] for i in rows), whole.valid.examples
        test = whole.test or replace(whole.valid, name="test", examples=valid[VALID:])
        train, valid_rows = replace(whole.train, examples=chosen), replace(whole.valid, examples=valid[:VALID])
        return replace(whole, train=train, valid=valid_rows, test=test, parted=False)

    def wrong(self, rows: Sequence[int]) -> Floats:
        """Trains on these rows: 1 for each test row that it then gets wrong. [n]"""
        if self.session is None:
            self.session = self.job.open()
            self.start: TrainState = self.session.get_state()
        job = replace(self.job, prepared=self.with_rows(rows))
        trained(job, self.session, self.start, **self.train)
        made = result_of(evaluate_held_out(self.session, job.recipe, job.prepared, job.tokenizer, "tuned"))
        return np.array([float(not row.correct) for row in made.results])

    def choice(self, rows: Sequence[int], accuracy: float) -> list[int]:
        """The next rows by the model that was just trained on these."""
        assert self.session is not None  # it was trained
        rest = self.rest(rows)
        asked = replace(self.job.prepared, test=Split("test", len(rest), tuple(self.pool[i] for i in rest)))
        made = result_of(next_rows(self.session, self.job.recipe, asked, self.with_rows(rows), accuracy, EACH))
        return [rest[one.number] for one in made]

    def rest(self, rows: Sequence[int]) -> list[int]:
        return sorted(set(range(len(self.pool))) - set(rows))


class Words(Learner):
    """Naive Bayes on the words."""

    def wrong(self, rows: Sequence[int]) -> Floats:
        prepared = self.with_rows(rows)
        held_out = prepared.held_out.examples
        self.counts = WordCounts(prepared.train.examples, prepared.labels)
        said = self.counts.logprobs(held_out).argmax(axis=1).tolist()
        return np.array([float(self.counts.labels[i] != row.answer) for i, row in zip(said, held_out, strict=True)])

    def choice(self, rows: Sequence[int], accuracy: float) -> list[int]:
        new, before = self.new(rows), self.with_rows(rows).train.examples
        said = self.sure(new, before, accuracy)
        return [new[i] for i in choose(said, [self.pool[i].prompt for i in new], [row.prompt for row in before], EACH)]

    def new(self, rows: Sequence[int]) -> list[int]:
        rest = self.rest(rows)
        return [rest[i] for i in new_rows([self.pool[i] for i in rest], self.with_rows(rows))]

    def sure(self, new: Sequence[int], before: Sequence[Example], accuracy: float) -> Floats:
        return margins(as_sure_as_right(self.counts.logprobs([self.pool[i] for i in new]), accuracy))


class Head(Words):
    """A linear head on the states of the frozen model, by ridge regression: one column for each label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        held_out = self.with_rows([]).held_out.examples
        rows, limit = (*self.pool, *held_out), self.job.recipe.train.tokens_at_once
        self.states = result_of(row_states(self.job.open(), rows, limit, "states")).astype(np.float64)
        self.truth = classes_of(rows)

    def wrong(self, rows: Sequence[int]) -> Floats:
        seen, wanted = self.states[rows], np.eye(len(self.job.prepared.labels))[self.truth[rows]]
        middle, spread = seen.mean(axis=0), seen.std(axis=0) + 1e-6
        seen = (seen - middle) / spread
        alike = seen @ seen.T  # [n, n]
        alike += RIDGE * np.trace(alike) / len(rows) * np.eye(len(rows))
        weight = seen.T @ np.linalg.solve(alike, wanted - wanted.mean(axis=0))
        self.scores = (self.states - middle) / spread @ weight + wanted.mean(axis=0)  # [all rows, K]
        held_out = slice(len(self.pool), None)
        return (self.scores[held_out].argmax(axis=1) != self.truth[held_out]).astype(float)

    def sure(self, new: Sequence[int], before: Sequence[Example], accuracy: float) -> Floats:
        labels = self.job.prepared.labels
        told = words_say(before, labels, [self.pool[i] for i in new])
        columns = [labels.index(label) for label in told.labels]
        return told.margins_with(self.scores[np.ix_(new, columns)], accuracy)


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
    answers = Counter(example.answer for example in learner.with_rows([]).held_out.examples)
    ahead = look_ahead(seen, max(answers.values()) / answers.total())
    told = {"measured": [round(1 - cost, 4) for cost in ahead.costs], "says": ahead.answer}
    real = float(twice.mean())
    told["predicted"] = [round(1 - ahead.high, 4), round(1 - ahead.low, 4)]
    return told | {"twice": round(1 - real, 4), "right": bool(ahead.low <= real <= ahead.high)}


def lines(asked: argparse.Namespace, name: str, out: Path) -> Iterator[dict[str, Any]]:
    settings = [f"model.path={asked.model}", f"data.limit={asked.rows}", "evaluate.forgetting=false", *asked.set]
    settings += ["head.first_epochs=0"] if asked.head else []
    job = job_of(name, asked.data.absolute(), out, settings)
    kind = Words if asked.words else Head if asked.head else Learner
    learner = kind(job, {"learning_rate": asked.rate, "epochs": asked.epochs, "early_stopping": None})
    for seed in range(asked.seed, asked.seed + asked.seeds):
        order = np.random.default_rng(seed).permutation(len(learner.pool))
        told = curve(learner, order, asked.first) if asked.curve else rounds(learner, order, asked.first, asked.rounds)
        yield {
            "set": name,
            "seed": seed,
            "first": asked.first,
            "test": len(learner.with_rows([]).held_out.examples),
        } | told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["reviews"])
    parser.add_argument("--rows", type=int, default=2000, help="of each split at most")
    for option, default in (("--first", 100), ("--rounds", 3), ("--seeds", 1), ("--seed", 0), ("--epochs", 6)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--model", default="builtin:reviews-base")
    parser.add_argument("--rate", type=float, default=3e-3)
    stands_in = parser.add_mutually_exclusive_group()
    stands_in.add_argument("--words", action="store_true")
    stands_in.add_argument("--head", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    for name in asked.sets:
        with tempfile.TemporaryDirectory() as out:
            for line in lines(asked, name, Path(out)):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
