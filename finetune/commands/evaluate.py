"""`eval`: a run's base and tuned model measured again, on its held-out rows or on others."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.disk.run_folder import open_existing


def evaluate(path: Path, data: str | None, backend: str | None) -> None:
    run, recipe = open_existing(path)  # first: what is wrong with it needs none of the libraries below
    from rich.console import Console

    from backends.interface import TrainState
    from finetune.disk.adapter import read_adapter
    from finetune.disk.atomic import write_file
    from finetune.report.report import compare
    from finetune.report.summary import print_comparison
    from finetune.run import base_weights, check_base
    from finetune.screen import open_screen
    from finetune.training.job import load_job

    if data is not None:
        source = str(Path(data).resolve()) if Path(data).exists() else data
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": source})})
    adapter = read_adapter(run.adapter)
    job = load_job(recipe, backend)
    check_base(run.adapter, job.model)
    session = job.open()
    session.set_state(TrainState(0, adapter.tensors, {}))
    with open_screen() as screen:
        with base_weights(session):
            base = job.measure(session, job.prepared.held_out, "base model", screen.handle)
        tuned = job.measure(session, job.prepared.held_out, "tuned model", screen.handle)
    comparison = compare(base, tuned)
    print_comparison(Console(), base, tuned, comparison, f"{job.prepared.held_out.rows} rows of {data or path}")
    found = {"data": data, "base": base.summary(), "tuned": tuned.summary(), "verdict": comparison.verdict}
    write_file(run.path / "eval.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
