"""`eval`: a run's base and tuned model evaluated again, on its held-out rows or on others."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

from backends.interface import FloatArray, Session
from finetune.check.run_analysis import analysing, questions_of
from finetune.console import Console
from finetune.disk.atomic import write_file
from finetune.disk.identity import check_held_out
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_head import read_head
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.evaluation.baselines import bag_of_words
from finetune.evaluation.evaluate import Evaluation, base_weights, evaluate_held_out
from finetune.events import Progress
from finetune.recipe.names import local
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.report import compare
from finetune.report.summary import print_comparison, render_analysis
from finetune.training.head_first import HEAD_ALONE
from finetune.training.job import Job, making_ready
from finetune.training.pair_references import with_references
from finetune.training.reopen import measured_again


def run(opened: RunFolder, recipe: Recipe, data: str | None, backend: str | None) -> None:
    """Prints both models side by side with their kinds of error, and writes eval.json."""
    adapter = read_trained(opened)
    recorded = measured_again(recipe, backend, opened) if data is None else None
    job = recorded or job_of_files(opened, recipe, data, backend)
    check_run_base(opened, job.folder)
    session = job.open(adapter)
    head = read_head(opened)
    base, tuned = with_progress(_evaluate_both(job, session, head))
    analysis = with_progress(analysing(without_forgetting(job), session, questions_of(job), base, tuned, head))
    comparison = compare(base, tuned, bag_of_words(job.prepared, opened.words))
    console = Console()
    title = f"{tuned.rows} rows of {data or opened.path}{HEAD_ALONE if recipe.head else ''}"
    print_comparison(console, base, tuned, comparison, title)
    render_analysis(console, analysis)
    values = {
        "data": data,
        "base": base.summary(),
        "tuned": tuned.summary(),
        "verdict": comparison.verdict,
        "analysis": analysis.to_json(rows=False),
    }
    write_file(opened.path / "eval.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def job_of_files(opened: RunFolder, recipe: Recipe, data: str | None, backend: str | None) -> Job:
    """The rows of `data`; without it those of the recipe's files, which must be what the run measured."""
    labels = None
    if data is not None:
        labels = opened.labels()  # the training rows are not needed for them
        source = str(local(data, Path.cwd()) or data)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": source})})
    job = with_progress(making_ready(recipe, backend, opened.path, labels))
    if data is None:
        check_held_out(opened.path, job.prepared, "Put the rows back as they were, or name other rows with --data")
    return job


def without_forgetting(job: Job) -> Job:
    """The run has measured it, and the adapter is the same."""
    evaluate = job.recipe.evaluate.model_copy(update={"forgetting": False})
    return replace(job, recipe=job.recipe.model_copy(update={"evaluate": evaluate}))


def _evaluate_both(
    job: Job, session: Session, head: Mapping[str, FloatArray] | None
) -> Generator[Progress, None, tuple[Evaluation, Evaluation]]:
    """The base model, then the tuned one. head: as `base_weights` takes it."""
    prepared = yield from with_references(job, session)
    job = replace(job, prepared=prepared)
    with base_weights(session, head):
        base = yield from evaluate_held_out(session, job.recipe, job.prepared, job.tokenizer, "base model")
    tuned = yield from evaluate_held_out(session, job.recipe, job.prepared, job.tokenizer, "tuned model")
    return base, tuned
