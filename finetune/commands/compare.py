"""`compare`: runs over iterations on the same held-out rows, on the terminal, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.commands.evaluate import job_of_files
from finetune.console import Console
from finetune.data.rows import Split
from finetune.disk.atomic import write_file
from finetune.disk.held_out_rows import read_held_out
from finetune.disk.identity import split_digest
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import FinetuneError, Incompatible
from finetune.evaluation.evaluate import Evaluation, evaluate_held_out
from finetune.report.finished_run import FinishedRun, read_finished
from finetune.report.iteration_tables import print_iterations
from finetune.report.iterations import compared
from finetune.report.live_screen import with_progress
from finetune.report.page.compare_page import compare_page
from finetune.report.page.without_rows import numbered_for, without_rows
from finetune.training.job import Job, making_ready
from finetune.training.reopen import measured_again

# What decides how a row becomes tokens, beside the tokenizer.
_PROMPT = ("task", "data.format", "prompt.template", "prompt.system", "prompt.completion", "prompt.end_token",
           "prompt.loss_on", "train.max_length", "train.truncation", "labels")  # fmt: skip


def run(
    paths: Sequence[Path],
    measure: bool,
    data: str | None,
    html: Path | None,
    rows: bool,
    backend: str | None,
) -> None:
    """Prints the comparison, and writes compare.json and compare.html into the last run's folder, or `html`.

    measure: every run on the recorded rows of the first; data: every run on the rows of that file.
    """
    runs = [read_finished(path) for path in paths]
    notes: list[str] = []
    if data is not None:
        runs = [_measured(one, job_of_files(RunFolder(one.path), one.recipe, data, backend)) for one in runs]
    elif measure:
        runs, notes = _on_rows_of_the_first(runs, backend)
    found = compared(runs, notes)
    print_iterations(Console(), found)
    page = html or paths[-1] / "compare.html"
    if not rows:
        numbered = numbered_for(runs)
        found = compared([without_rows(one, numbered) for one in runs], notes)
    write_file(page.with_suffix(".json"), json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_file(page, compare_page(found, rows))
    Console().print(f"the page: {page}", soft_wrap=True)


def _on_rows_of_the_first(runs: Sequence[FinishedRun], backend: str | None) -> tuple[list[FinishedRun], list[str]]:
    """Raises Incompatible where a run reads the rows in another way, or was trained on all of them."""
    first, *others = runs
    recorded = read_held_out(RunFolder(first.path))
    if recorded is None:
        raise Incompatible(f"{first.path}: it has recorded no held-out rows; name a file of rows with --data FILE")
    rows = list(recorded.split.examples)
    notes: list[str] = []
    jobs = [_recorded(first, backend)]
    for one in others:
        _check_reading(first, one)
        job, note = _with_training_rows(one, backend)
        trained_on = {example.tokens.tobytes() for example in job.prepared.train.examples}
        unseen = [row for row in rows if row.tokens.tobytes() not in trained_on]
        if len(unseen) < len(rows):
            note = f"{len(rows) - len(unseen)} rows that {one.name} was trained on are left out."
        rows, notes = unseen, notes + [note] * bool(note)
        jobs.append(job)
    if not rows:
        raise Incompatible(f"{first.path}: the other runs were trained on all of its held-out rows; use --data FILE")
    split = Split("test", len(rows), examples=tuple(rows))
    asked = [replace(job, prepared=replace(job.prepared, test=split)) for job in jobs]
    return [_measured(one, job) for one, job in zip(runs, asked, strict=True)], notes


def _check_reading(first: FinishedRun, other: FinishedRun) -> None:
    files = [one.identity.get("base_model", {}).get("files", {}).get("tokenizer.json") for one in (first, other)]
    differing = [key for key in _PROMPT if first.identity.get(key) != other.identity.get(key)]
    differing += ["the tokenizer"] * (files[0] != files[1])
    if differing:
        raise Incompatible(
            f"{other.path}: writes prompts in another way than {first.path} ({', '.join(differing)})",
            "Measure both on a file of rows with --data FILE: each then reads it in its own way.",
        )


def _recorded(finished: FinishedRun, backend: str | None) -> Job:
    job = measured_again(finished.recipe, backend, RunFolder(finished.path))
    if job is None:
        raise Incompatible(f"{finished.path}: it has recorded no held-out rows; name a file of rows with --data FILE")
    return job


def _with_training_rows(finished: FinishedRun, backend: str | None) -> tuple[Job, str]:
    """With a note where its training rows can no longer be read, or are others now."""
    try:
        job = with_progress(making_ready(finished.recipe, backend, finished.path))
    except FinetuneError as error:
        job, reason = _recorded(finished, backend), str(error).splitlines()[0]
    else:
        same = finished.identity.get("rows", {}).get("train") == split_digest(job.prepared.train)
        reason = "" if same else "its training rows have changed since"
    return job, reason and f"Not checked whether {finished.name} was trained on some of these rows: {reason}."


def _measured(finished: FinishedRun, job: Job) -> FinishedRun:
    """The run with its tuned model's figures on the rows that the job holds out."""
    folder = RunFolder(finished.path)
    adapter = read_trained(folder)
    check_run_base(folder, job.folder)
    work = evaluate_held_out(job.open(adapter), job.recipe, job.prepared, job.tokenizer, finished.name)
    tuned: Evaluation = with_progress(work)
    return replace(finished, tuned=tuned, base=None, analysis=None)
