"""Reopens a finished run's model and rows for another evaluation."""

from __future__ import annotations

from collections.abc import Generator

from backends import registry
from finetune.data.problems import refuse_rows
from finetune.data.rows import Prepared, Row, Rows, Split
from finetune.data.tokenizer import stop_tokens
from finetune.data.unanswered import unanswered
from finetune.disk.held_out_rows import REMEDY, read_held_out
from finetune.disk.identity import check_held_out, clock_of
from finetune.disk.run_folder import RunFolder
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.training.job import Job, refuse_unfit, set_up


def ready_to_answer(
    recipe: Recipe, backend: str | None, run: RunFolder, source: Rows
) -> Generator[Progress, None, tuple[Job, list[Row]]]:
    """Rows as a run's model is asked them, in `test`, and the row of each. Raises as `making_ready` does.

    Every row that cannot be asked is a bad one, which `data.on_error` leaves out.
    """
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run.path)
    setup.check_backend(chosen)
    account = run.account()
    labels, always = (tuple(account.labels), account.always) if account else ((), None)
    clock = clock_of(run.path)
    prepared, rows = yield from unanswered(recipe, setup.tokenizer, source, labels, always, clock)
    left_out = [*prepared.held_out.left_out, *prepared.held_out.too_long]
    if recipe.data.on_error == "stop" or not rows:
        refuse_rows(left_out)
    refuse_unfit(setup, prepared)
    return Job(recipe, setup.folder, setup.tokenizer, chosen, prepared), rows


def measured_again(recipe: Recipe, backend: str | None, run: RunFolder) -> Job | None:
    """The rows that a run measured, as it has recorded them: no file of rows is read. None where it has recorded none.

    Raises Incompatible where they are not what the run wrote, and as `set_up` does.
    """
    recorded = read_held_out(run)
    if recorded is None:
        return None
    chosen = registry.choose(backend or recipe.backend)
    setup = set_up(recipe, run.path)
    setup.check_backend(chosen)
    split = recorded.split
    if recipe.task == "auto" or recipe.data.format == "auto":
        raise ValueError("the recipe of a run names its task and its format")
    prepared = Prepared(
        task=recipe.task,
        format=recipe.data.format,
        template=recipe.prompt.template,
        train=Split("train", 0),
        valid=split if split.name == "valid" else Split("valid", 0),
        test=split if split.name == "test" else None,
        labels=recorded.labels,
        label_tokens=recorded.label_tokens,
        stop_tokens=stop_tokens(setup.tokenizer),
    )
    check_held_out(run.path, prepared, f"{run.held_out.name} was changed: {REMEDY}, or name other rows with --data")
    refuse_unfit(setup, prepared)
    return Job(recipe=recipe, folder=setup.folder, tokenizer=setup.tokenizer, backend=chosen, prepared=prepared)
