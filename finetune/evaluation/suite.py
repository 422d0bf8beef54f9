"""Suites: cases of a prompt and checks, and how many a model passes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from backends.interface import FloatArray, Session
from finetune.data.problems import listed
from finetune.data.rows import Prepared, Row, Rows
from finetune.data.tokenizer import Tokenizer
from finetune.errors import DataError
from finetune.evaluation.evaluate import base_weights
from finetune.evaluation.intervals import mcnemar_exact, wilson_interval
from finetune.evaluation.predict import predict
from finetune.evaluation.suite_checks import Checks
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.text import harmless, shorten

CHECKS, NAME = "checks", "name"  # keys of a case beside what is asked
ASKED = "suite: {}"  # in the progress: of which model
_SHOWN = 200  # characters of an answer


@dataclass(frozen=True)
class Case:
    row: Row  # what is asked
    checks: Checks
    name: str = ""

    @property
    def title(self) -> str:
        """file:line, and its name."""
        return f"{self.row.location}{f' ({self.name})' if self.name else ''}"


@dataclass(frozen=True)
class Suite:
    """The cases of a file, ready to be asked."""

    file: str
    cases: tuple[Case, ...]
    prepared: Prepared  # the case of each is at the same place among the examples of `held_out`


@dataclass(frozen=True)
class Outcome:
    """One model's answer to a case. No failures: it passes."""

    answer: str
    failures: tuple[str, ...]


@dataclass(frozen=True)
class SuiteResult:
    """Both models on all cases."""

    file: str
    cases: tuple[Case, ...]
    base: tuple[Outcome, ...] | None
    tuned: tuple[Outcome, ...]

    def passed(self, outcomes: Sequence[Outcome]) -> tuple[int, tuple[float, float]]:
        """How many, and the 95 % interval of their share."""
        count = sum(not outcome.failures for outcome in outcomes)
        return count, wilson_interval(count, len(outcomes))

    def failures(self) -> list[str]:
        """A line for each case that the tuned model fails."""
        return [
            f"{case.title}: {'; '.join(outcome.failures)}: {_answer(outcome.answer)}"
            for case, outcome in zip(self.cases, self.tuned, strict=True)
            if outcome.failures
        ]

    def summary(self) -> str:
        """Both models in a line, and whether they differ by more than chance."""
        total, line = len(self.cases), f"suite {self.file}: the tuned model passes {self._share(self.tuned)}"
        if self.base is None:
            return f"{line} of {total} cases"
        change = self._change()
        test = f"McNemar's exact test: p = {change['p_value']:.2g}"
        changed = f"{change['fixed']} fixed, {change['broken']} broken, {test}"
        return f"{line} of {total} cases, the base {self._share(self.base)}; {changed}"

    def _change(self) -> dict[str, Any]:
        """From the base to the tuned model; nothing without a base."""
        if self.base is None:
            return {}
        pairs = [(not b.failures, not t.failures) for b, t in zip(self.base, self.tuned, strict=True)]
        fixed, broken = pairs.count((False, True)), pairs.count((True, False))
        return {"fixed": fixed, "broken": broken, "p_value": mcnemar_exact(fixed, broken)}

    def shortfall(self, at_least: float) -> str | None:
        """Why the tuned model does not surely pass that share of cases: the interval's lower end is below; or None."""
        count, (low, _) = self.passed(self.tuned)
        if low >= at_least:
            return None
        why = f"{count} of {len(self.cases)} cases pass, and the interval's lower end is {low:.3f}, below {at_least:g}"
        if count == len(self.cases):
            return f"{why}: all pass, and it takes {cases_needed(at_least)} cases to say so; add cases"
        return why

    def figures(self) -> dict[str, Any]:
        """Of both models, for JSON, without the single cases."""
        shares = {name: outcomes and self.passed(outcomes) for name, outcomes in self._models.items()}
        plain = {name: share and {"passed": share[0], "interval": list(share[1])} for name, share in shares.items()}
        return {"file": self.file, "cases": len(self.cases), **plain, **self._change()}

    def to_json(self) -> dict[str, Any]:
        """What suite.json holds: a case's location has the key `place`."""
        results = [
            {
                "place": case.row.location,
                "name": case.name,
                **{
                    name: {"answer": outcomes[i].answer, "failures": list(outcomes[i].failures)}
                    for name, outcomes in self._models.items()
                    if outcomes
                },
            }
            for i, case in enumerate(self.cases)
        ]
        return {**self.figures(), "results": results}

    @property
    def _models(self) -> dict[str, tuple[Outcome, ...] | None]:
        return {"base": self.base, "tuned": self.tuned}

    def _share(self, outcomes: Sequence[Outcome]) -> str:
        count, (low, high) = self.passed(outcomes)
        return f"{count} ({low:.3f} to {high:.3f})"


def cases_needed(at_least: float) -> int:
    """How many cases there must be, all passed, for the interval's lower end to reach that share (below 1)."""
    count = max(1, math.floor(3.8 * at_least / (1 - at_least)))  # a little below, then counted
    while wilson_interval(count, count)[0] < at_least:
        count += 1
    return count


def read_cases(source: Rows) -> tuple[Case, ...]:
    """Raises DataError with every case that is none, each with its file and line."""
    cases, bad = [], list(source.bad)
    lines: set[str] = set()
    for row in source.rows:
        if row.location in lines:
            bad.append((row.location, "another case stands on this line; write one case a line"))
            continue
        lines.add(row.location)
        try:
            cases.append(_case(row))
        except ValueError as error:
            bad.append((row.location, str(error)))
    if bad:
        raise DataError(*listed(bad), f"{len(bad)} of the suite's cases cannot be read; fix them")
    return tuple(cases)


def _case(row: Row) -> Case:
    """Raises ValueError."""
    fields = dict(row.fields)
    checks, name = fields.pop(CHECKS, None), fields.pop(NAME, "")
    if not isinstance(checks, Mapping) or not checks:
        astray = next((key for key in fields if key in Checks.model_fields), "contains")
        raise ValueError(f'has no checks; write them as an object, such as "{CHECKS}": {{"{astray}": ...}}')
    if not isinstance(name, str):
        raise ValueError(f"{NAME} must be text")
    try:
        made = Checks.model_validate(dict(checks))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(_explained(first["loc"], first["msg"], first["type"])) from None
    if not any(value is not None for value in dict(made).values()):
        raise ValueError("all its checks are null; write at least one")
    return Case(Row(fields, row.file, row.line), made, name)


def _explained(keys: Sequence[int | str], message: str, kind: str) -> str:
    key = harmless(str(keys[0]))
    if kind == "extra_forbidden" and len(keys) == 1:
        close = difflib.get_close_matches(key, Checks.model_fields, n=1)
        there = f"did you mean {close[0]}?" if close else f"there are {', '.join(Checks.model_fields)}"
        return f"{CHECKS}.{shorten(key, 40)}: no such check; {there}"
    return f"{CHECKS}.{key}: {shorten(message.removeprefix('Value error, '), 300)}"


def _answer(text: str) -> str:
    return f'"{harmless(shorten(text, _SHOWN))}"'


def measure_suite(
    session: Session,
    recipe: Recipe,
    tokenizer: Tokenizer,
    suite: Suite,
    base: bool = True,
    head: Mapping[str, FloatArray] | None = None,
) -> Generator[Progress, None, SuiteResult]:
    """The tuned model's answers judged, and the base's where that is asked for. Raises MemoryExhausted.

    head: as `base_weights` takes it.
    """
    before = None
    if base:
        with base_weights(session, head):
            before = yield from _outcomes(session, recipe, tokenizer, suite, "base model")
    after = yield from _outcomes(session, recipe, tokenizer, suite, "tuned model")
    return SuiteResult(suite.file, suite.cases, before, after)


def _outcomes(
    session: Session, recipe: Recipe, tokenizer: Tokenizer, suite: Suite, model: str
) -> Generator[Progress, None, tuple[Outcome, ...]]:
    what, most = ASKED.format(model), recipe.evaluate.max_tokens
    made = yield from predict(session, recipe, suite.prepared, tokenizer, most, what)
    return tuple(
        Outcome(one.predicted, tuple(case.checks.failures(one.predicted)))
        for case, one in zip(suite.cases, made, strict=True)
    )
