"""`check`: everything that can be said of the data before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

from finetune.check.show import show
from finetune.check.survey import Findings, as_json, survey
from finetune.console import Console
from finetune.data.prepare import prepare
from finetune.data.template_clock import now
from finetune.disk.atomic import write_file
from finetune.errors import DataError
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.training.job import Setup, refuse_unfit, set_up


def run(recipe: Recipe, json_file: Path | None) -> None:
    """Raises DataError, after everything is shown, where rows must be fixed, or as `refuse_unfit` does."""
    setup = set_up(recipe)
    findings = with_progress(_look(setup))
    show(Console(), findings, setup.tokenizer)
    if json_file is not None:
        text = json.dumps(as_json(findings, setup.tokenizer), indent=2, ensure_ascii=False)
        write_file(json_file, f"{text}\n")
    if findings.faults:
        skip = "" if findings.skipped or not findings.bad else "; or leave bad rows out with data.on_error: skip"
        count = findings.faults
        raise DataError(f"{count:,} fault{'s' * (count > 1)} to fix before training{skip}")
    refuse_unfit(setup, findings.prepared)


def _look(setup: Setup) -> Generator[Progress, None, Findings]:
    prepared = yield from prepare(setup.recipe, setup.tokenizer, base=None, clock=now())
    return (yield from survey(setup.recipe, prepared, setup.folder, setup.tokenizer))
