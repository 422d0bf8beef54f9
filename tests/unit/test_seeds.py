"""Twenty pairs of runs that differ in the seed alone, trained on the numpy reference: none is called better for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from finetune.data.rows import Example, Prepared, Split
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.iterations import compare_runs
from tests.unit.toy_run import LABEL_TOKENS, LABELS, STOP, VOCABULARY, prepared, recipe, result_of, session, trainer


def rows(name: str, count: int, seed: int) -> Split:
    """The last token of a prompt tells the label in three of four rows; the others are as chance has it."""
    rng, examples = np.random.default_rng(seed), []
    for row in range(count):
        last = int(rng.integers(10, 26))
        label = last % 3 if rng.uniform() < 0.75 else int(rng.integers(3))
        prompt = [*rng.integers(10, VOCABULARY, rng.integers(2, 6)), last]
        tokens = np.array([*prompt, *LABEL_TOKENS[label], *STOP], np.int32)
        weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        text, ends = f"question {row}", (len(prompt), len(tokens) - 1)
        examples.append(Example(tokens, weights, f"{name}.jsonl:{row + 1}", LABELS[label], text, *ends))
    return Split(name, count, examples=tuple(examples))


def trained(folder: Path, data: Prepared, seed: int) -> Evaluation:
    """A short run, so that the seed decides much of what is learnt."""
    live = session(folder / "model", dropout=0.0, seed=seed)
    train = {"epochs": 3, "learning_rate": 0.05, "batch_size": 8, "checkpoint_every": 100}
    asked = recipe(seed=seed, train=train, evaluate={"every": 100})
    for _ in trainer(folder / str(seed), live, asked, data).events():
        pass
    assert data.test
    return result_of(evaluate(live, data, data.test, name="model", micro_tokens=4096))


def test_of_twenty_pairs_of_seeds_at_most_one_is_called_better(tmp_path: Path) -> None:
    """McNemar's test alone would call several so: it asks whether these two models differ, and they do."""
    data = replace(prepared(), train=rows("train", 48, 1), valid=rows("valid", 12, 2), test=rows("test", 120, 3))
    runs = [trained(tmp_path, data, seed) for seed in range(21)]
    assert len({run.accuracy for run in runs}) > 10
    by_rows = [compare_runs(pair, [None, None]).steps[0].errors.verdict for pair in pairwise(runs)]
    told = [compare_runs(pair, [None, None], {(0, 1)}).steps[0].errors.verdict for pair in pairwise(runs)]
    assert by_rows.count("Better") > 1, "the rule has nothing to do"
    assert told.count("Better") + told.count("Worse") == 0
    assert told.count("Only the seed differs") == by_rows.count("Better") + by_rows.count("Worse")
