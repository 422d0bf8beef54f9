"""The report's figures: base, tuned, overfitting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import connections
from finetune.disk.adapter_check import Loading
from finetune.disk.atomic import write_file
from finetune.disk.run_files import read_json
from finetune.errors import Incompatible
from finetune.evaluation.baselines import Words
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import mcnemar_exact
from finetune.evaluation.leaked import Leaked
from finetune.evaluation.suite import SuiteResult
from finetune.evaluation.verdict import Overfitting, comparison_verdict
from finetune.events import Validated
from finetune.report.run_facts import Facts
from finetune.report.run_times import Times
from finetune.training.rate_race import Race

_REMEDY = "delete it, and the model is evaluated again"


@dataclass(frozen=True)
class Comparison:
    """The base model against the tuned one on the same rows."""

    fixed: tuple[tuple[RowResult, RowResult], ...]  # (base, tuned): wrong before, right now
    broken: tuple[tuple[RowResult, RowResult], ...]  # right before, wrong now
    p_value: float | None  # McNemar's exact test, two-sided; None where answers are not right or wrong
    verdict: str
    words: Words | None = None  # naive Bayes on the words, where there are labels


@dataclass(frozen=True)
class Report:
    """What the terminal shows and report.json holds."""

    run: str
    facts: Facts
    times: Times
    adapter: str | None
    backend: str
    device: str
    scheme: str
    check: str  # what `finetune check` found in the data, in a line
    held_out: str  # the rows that were evaluated: "200 test rows"
    base: Evaluation | None
    tuned: Evaluation
    comparison: Comparison | None
    leaked: Leaked | None  # None where no held-out row stands in the training rows
    overfitting: Overfitting
    divergence: str | None  # a notice that the loss was above that of random guessing
    validations: tuple[Validated, ...]
    best_step: int
    limited: tuple[str, ...] = ()  # what data.limit left of each split
    analysis: Analysis | None = None  # kinds of error, groups, and what was forgotten
    race: Race | None = None  # that chose the learning rate; None where the recipe names one
    suite: SuiteResult | None = None  # None where the recipe names none
    loads: tuple[Loading, ...] = ()  # whether PEFT and mlx-lm would load the adapter's folder

    def to_json(self) -> dict[str, Any]:
        """What report.json holds: everything but the single rows."""
        comparison = self.comparison and {
            "verdict": self.comparison.verdict,
            "fixed": len(self.comparison.fixed),
            "broken": len(self.comparison.broken),
            "p_value": self.comparison.p_value,
            "bag_of_words": self.comparison.words and self.comparison.words.accuracy,
            "bag_of_words_seconds": self.comparison.words and self.comparison.words.seconds,
        }
        return {
            "run": self.run,
            "facts": asdict(self.facts),
            "time": asdict(self.times),
            "adapter": self.adapter,
            "loads": [asdict(loading) for loading in self.loads],
            "backend": self.backend,
            "device": self.device,
            "scheme": self.scheme,
            "check": self.check,
            "held_out": self.held_out,
            "base": self.base and self.base.summary(),
            "tuned": self.tuned.summary(),
            "comparison": comparison,
            "analysis": self.analysis and self.analysis.to_json(rows=False),
            "leaked": self.leaked and self.leaked.to_json(),
            "overfitting": asdict(self.overfitting),
            "divergence": self.divergence,
            "suite": self.suite and self.suite.figures(),
            "best_step": self.best_step,
            "limited": list(self.limited),
            "validations": [asdict(validated) for validated in self.validations],
            **({"race": asdict(self.race)} if self.race else {}),
            **connections.account(),
        }


def compare(base: Evaluation, tuned: Evaluation, words: Words | None = None) -> Comparison:
    """The rows that changed, and whether the change is more than chance. words: of `bag_of_words`."""
    pairs = list(zip(base.results, tuned.results, strict=True))
    fixed = tuple(pair for pair in pairs if pair[0].correct is False and pair[1].correct)
    broken = tuple(pair for pair in pairs if pair[0].correct and pair[1].correct is False)
    p_value = mcnemar_exact(len(fixed), len(broken)) if tuned.accuracy is not None else None
    return Comparison(fixed, broken, p_value, comparison_verdict(base, tuned, p_value, words), words)


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Everything, rows included, so that a resumed run need not evaluate again. Raises DiskError."""
    write_file(path, json.dumps(evaluation.to_json(), ensure_ascii=False) + "\n")


def load_evaluation(path: Path, expected: Sequence[str | None] | None = None) -> Evaluation | None:
    """None where there is no such file. Raises Incompatible for one that no run writes, or of rows with other answers
    than `expected`.
    """
    saved = read_json(path, Evaluation, _REMEDY)
    if saved and expected is not None and [row.expected for row in saved.results] != list(expected):
        raise Incompatible(f"{path}: of other rows than this run's; {_REMEDY}")
    return saved
