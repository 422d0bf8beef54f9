"""A run that was trained for a few steps on a tiny model, and its exports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.commands import export
from finetune.data.collate import micro_batches
from finetune.disk.run_folder import RunFolder, create, open_existing
from finetune.recipe.schema import Recipe
from finetune.training.save_result import save_trained
from tests.end_to_end.command import Work, reviews
from tests.unit.toy_run import load_job

STEPS = 25
Runs = Callable[..., RunFolder]  # (backend, quantize, kind)


def rows_of(kind: str, first: int, count: int) -> list[dict[str, Any]]:
    """Rows of a format, each asked for the film's label."""
    rows = reviews(first, count)
    if kind == "chat":
        return [
            {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
            for row in rows
        ]
    if kind == "text":
        return [{"text": f"{row['text']}: {row['label']}"} for row in rows]
    if kind == "prompt":
        return [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    if kind == "alpaca":
        return [{"instruction": "what is this", "input": row["text"], "output": row["label"]} for row in rows]
    return rows


def trained_run(
    folder: Path, model: Path, backend: str, kind: str = "classification", held_out: int = 12, **sections: Any
) -> RunFolder:
    """A run's folder with its adapter, without the records of training. kind: of its rows. held_out: their number."""
    work = Work(folder, model)
    train = str(work.lines("train.jsonl", rows_of(kind, 0, 26)))
    test = str(work.lines("test.jsonl", rows_of(kind, 100, held_out)))
    values: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": train, "test": test, "format": kind},
        "output": str(folder / "runs"),
        "backend": backend,
        "device": "cpu",
        "evaluate": {"max_tokens": 12},
    }
    recipe = Recipe.model_validate(values | sections)
    run, job = create(recipe, "toy"), load_job(recipe)
    session = job.open()
    batches = micro_batches(job.prepared.train.examples, 4096)
    for _ in range(STEPS):
        session.step(batches, 1e-2)
    adapter = session.get_state().adapter
    save_trained(job, run, adapter, session, STEPS)
    run.write_json("data.json", {"labels": list(job.prepared.labels), "always": {}})
    (run.path / "report.txt").write_text("figures\n")
    return run


def made(
    run: RunFolder, to: str, kind: str | None = None, bits: int | None = None, adapter: bool = False, **more: Any
) -> Path:
    """The folder of an export."""
    opened, recipe = open_existing(run.path)
    options = {"output": None, "rows": 12, "backend": None} | more
    export.run(opened, copy.deepcopy(recipe), to, kind, bits, adapter, **options)
    return max(_exports(run), key=lambda path: path.stat().st_mtime_ns)


def _exports(run: RunFolder) -> list[Path]:
    folder = run.path / "exports"
    return sorted(one for one in folder.iterdir() if one.is_dir()) if folder.exists() else []
