"""`check`: everything that can be said of the data before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from finetune.check.show import show
from finetune.check.survey import as_json, survey
from finetune.disk.atomic import write_file
from finetune.errors import DataError
from finetune.recipe.schema import Recipe
from finetune.training.job import set_up


def check(recipe: Recipe, json_file: Path | None) -> None:
    """Raises DataError, after everything is shown, where rows must be mended."""
    setup = set_up(recipe)
    tokenizer = setup.tokenizer
    with Bar() as bar:
        found = survey(recipe, setup.folder, tokenizer, Path.cwd(), bar.report)
    show(Console(), found, tokenizer)
    if json_file is not None:
        write_file(json_file, json.dumps(as_json(found, tokenizer), indent=2, ensure_ascii=False) + "\n")
    if found.faults:
        skip = "" if found.skipped or not found.bad else "; or leave bad rows out with data.on_error: skip"
        raise DataError(f"{found.faults:,} fault{'s' * (found.faults > 1)} to mend before training{skip}")


class Bar:
    """One progress bar on standard error, that names what is under way."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done)
