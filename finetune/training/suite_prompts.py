"""Prepares a suite's cases with the run's own prompts."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import FloatArray, Session
from finetune.data.formats import QUESTION
from finetune.data.label_names import Labels
from finetune.data.problems import listed, named_by
from finetune.data.prompt_parts import Always, always_filled
from finetune.data.read import read
from finetune.data.renderers import CONVERSATIONS
from finetune.data.rows import Prepared, Row, Rows
from finetune.data.unanswered import unanswered
from finetune.disk.identity import clock_of
from finetune.disk.run_folder import RunFolder
from finetune.errors import DataError
from finetune.evaluation.suite import Case, Suite, SuiteResult, measure_suite, read_cases
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.text import from_here
from finetune.training.job import Job, Setup, making_ready, refuse_unfit, set_up

PROMPT = "prompt"  # how a case may call its question, whatever the recipe's column is called


def ready_with_suite(recipe: Recipe, run: Path | None) -> Generator[Progress, None, Job]:
    """`making_ready`, with the suite that the recipe names: read before anything else, and written as prompts."""
    cases = cases_of(recipe)
    job = yield from making_ready(recipe, run=run)
    return replace(job, suite=(yield from suite_of(job, job.prepared, cases)))


def suite_of(setup: Setup, rows: Prepared, cases: tuple[Case, ...]) -> Generator[Progress, None, Suite | None]:
    """The recipe's, with prompts as the rows have them; None where it names none. Needs the rows' records."""
    file = setup.recipe.evaluate.suite
    if not file:
        return None
    always = always_filled(rows.renderer, rows.format, rows.train.records)
    clock = rows.renderer.clock if rows.renderer else None
    return (yield from _prepare(setup, file, cases, rows.labels, always, clock))


def suite_again(
    recipe: Recipe, backend: str | None, run: RunFolder, file: str
) -> Generator[Progress, None, tuple[Job, Suite]]:
    """A suite for the model of a run. Raises as `set_up` does, and DataError for cases that cannot be asked."""
    cases = read_suite(file)
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run.path)
    setup.check_backend(chosen)
    account = run.account()
    labels, always = (tuple(account.labels), account.always) if account else ((), None)
    suite = yield from _prepare(setup, file, cases, labels, always, clock_of(run.path))
    return Job(recipe, setup.folder, setup.tokenizer, chosen, suite.prepared, suite), suite


def ask_suite(
    job: Job, suite: Suite, session: Session, head: Mapping[str, FloatArray] | None = None
) -> Generator[Progress, None, SuiteResult]:
    """The suite of a run, asked of both models where the recipe measures both. head: as `base_weights` takes it."""
    return measure_suite(session, job.recipe, job.tokenizer, suite, job.recipe.evaluate.base, head)


def cases_of(recipe: Recipe) -> tuple[Case, ...]:
    """Of the suite that the recipe names, if it names one. Raises DataError."""
    return read_suite(recipe.evaluate.suite, "evaluate.suite") if recipe.evaluate.suite else ()


def read_suite(file: str, key: str = "") -> tuple[Case, ...]:
    """The cases of a file, which messages name as from this folder. key: of the recipe, that names it.

    Raises DataError.
    """
    source = from_here(file)
    with named_by(key, source):
        return read_cases(read(source, Path.cwd(), "test"))


def _prepare(
    setup: Setup, file: str, cases: tuple[Case, ...], labels: Labels, always: Always | None, clock: datetime | None
) -> Generator[Progress, None, Suite]:
    """Raises DataError for cases that cannot be asked: none is left out."""
    rows = Rows([_asked(case.row, setup.recipe) for case in cases], [])
    prepared, asked = yield from unanswered(setup.recipe, setup.tokenizer, rows, labels, always, clock)
    split = prepared.held_out
    if bad := [*split.left_out, *split.too_long]:
        raise DataError(*listed(bad), f"{len(bad)} of the suite's cases cannot be asked; fix them")
    refuse_unfit(setup, prepared)
    by_location = {case.row.location: case for case in cases}
    return Suite(from_here(file), tuple(by_location[row.location] for row in asked), prepared)


def _asked(row: Row, recipe: Recipe) -> Row:
    """With its question in the column that the run's rows have it in."""
    layout, fields = recipe.data.format, dict(row.fields)
    if layout in CONVERSATIONS:
        part = "messages" if layout == "chat" else "conversations"
        asked = {PROMPT: _turn(fields.get(PROMPT)), "messages": fields.get("messages")}
    else:
        part, asked = QUESTION.get(layout, ""), {PROMPT: fields.get(PROMPT)}
    column = recipe.data.columns.get(part, part)
    for name, value in asked.items():
        if value is not None and column not in fields:
            fields = {column: value, **{key: one for key, one in fields.items() if key != name}}
    return Row(fields, row.file, row.line)


def _turn(prompt: Any) -> list[Mapping[str, str]] | None:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
