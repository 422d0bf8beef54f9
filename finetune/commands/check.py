"""`check`: everything that can be said of the data before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from finetune import events
from finetune.check.show import show
from finetune.check.survey import as_json, survey
from finetune.data.tokenizer import load_tokenizer
from finetune.disk.atomic import write_file
from finetune.errors import DataError
from finetune.events import Work
from finetune.recipe.locate import model_folder
from finetune.recipe.schema import Recipe


def run(recipe: Recipe, json_file: Path | None) -> None:
    """Raises DataError, after everything is shown, where rows must be mended."""
    model = model_folder(recipe.model)
    tokenizer = load_tokenizer(model, recipe.model.remote_code)
    work = Work(survey(recipe, model, tokenizer, Path.cwd()))
    with Bar() as bar:
        for progress in work:
            bar.show(progress)
    found = work.result
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

    def show(self, event: events.Progress) -> None:
        if event.what not in self.tasks:
            self.tasks[event.what] = self.progress.add_task(event.what, total=event.total)
        self.progress.update(self.tasks[event.what], completed=event.done)
