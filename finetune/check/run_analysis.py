"""Builds the extra questions about the held-out rows, and collects both models' answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from backends.interface import FloatArray, Session
from finetune.check.balance import groups_of
from finetune.data.rows import Prepared
from finetune.evaluation.analysis import Analyst, Questions, questions
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation
from finetune.events import Progress
from finetune.recipe.schema import Groups
from finetune.training.general_text import general_text_for
from finetune.training.job import Job


def questions_of(job: Job) -> Questions:
    """What is asked beside the held-out rows. The job's rows must still have their records."""
    groups = groups_held_out(job.prepared, job.recipe.data.groups)
    return questions(job.recipe, job.tokenizer, job.prepared, groups, general_text_for(job))


def groups_held_out(prepared: Prepared, groups: Groups | None) -> dict[str, list[int]]:
    """Group -> the numbers of its held-out examples. Needs the records."""
    if groups is None:
        return {}
    of = {record.location: [*groups_of(record, groups)] for record in prepared.held_out.records}
    named: dict[str, list[int]] = {}
    for number, example in enumerate(prepared.held_out.examples):
        for name in of.get(example.location, ()):
            named.setdefault(name, []).append(number)
    return {name: named[name] for name in sorted(named)}


def analysing(
    job: Job,
    session: Session,
    asked: Questions,
    base: Evaluation | None,
    tuned: Evaluation,
    head: Mapping[str, FloatArray] | None = None,
) -> Generator[Progress, None, Analysis]:
    """The errors of both models. session: with the tuned one in it. base, tuned: on the held-out rows. head: as
    `base_weights` takes it.
    """
    analyst = Analyst(session, job.recipe, job.prepared, job.tokenizer, asked, head)
    return (yield from analyst.analysing(base, tuned))
