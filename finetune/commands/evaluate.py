"""`eval`: a run's base and tuned model measured again, on its held-out rows or on others."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from backends.interface import TrainState
from finetune.disk.adapter import check_base, read_adapter
from finetune.disk.atomic import write_file
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.evaluate import base_weights
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import open_screen
from finetune.report.report import compare
from finetune.report.summary import print_comparison
from finetune.training.job import load_job


def evaluate(run: RunFolder, recipe: Recipe, data: str | None, backend: str | None) -> None:
    if data is not None:
        source = str(Path(data).resolve()) if Path(data).exists() else data
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": source})})
    adapter = read_adapter(run.adapter)
    job = load_job(recipe, backend)
    check_base(run.adapter, job.folder)
    session = job.open()
    session.set_state(TrainState(0, adapter.tensors, {}))
    with open_screen() as screen:
        with base_weights(session):
            base = job.measure(session, job.prepared.held_out, "base model", screen.handle)
        tuned = job.measure(session, job.prepared.held_out, "tuned model", screen.handle)
    comparison = compare(base, tuned)
    print_comparison(Console(), base, tuned, comparison, f"{job.prepared.held_out.rows} rows of {data or run.path}")
    found = {"data": data, "base": base.summary(), "tuned": tuned.summary(), "verdict": comparison.verdict}
    write_file(run.path / "eval.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
