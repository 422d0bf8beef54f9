"""`benchmark`: tasks of lm-eval for a run's base and tuned model, on the same rows."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from backends import registry
from finetune.connections import to_hub
from finetune.console import Console
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import DataError, FinetuneError, RecipeError
from finetune.evaluation.benchmark import Figure, Share, figures
from finetune.evaluation.evaluate import base_weights
from finetune.evaluation.lm_eval_model import LONGEST, local_data, model_of, task_manager
from finetune.evaluation.paired_changes import SIGNIFICANT
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import open_screen
from finetune.report.tables import figures_table
from finetune.text import shorten
from finetune.training.job import refuse_head, set_up

_SHOWN = 12  # tasks of groups, one by one; the rest stand in benchmark.json


def run(
    opened: RunFolder,
    recipe: Recipe,
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None,
    shots: int | None,
    backend: str | None,
) -> None:
    """Prints the figures of both models, and writes benchmark.json."""
    refuse_head(recipe, "benchmark")
    manager = task_manager()
    _check_tasks(tasks, manager.all_tasks)
    if data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder; name the one that the data sets of the tasks are in")
    adapter = read_trained(opened)
    setup = set_up(recipe, opened.path)
    chosen = registry.choose(backend or recipe.backend)
    setup.check_backend(chosen)
    check_run_base(opened, setup.folder)
    session = setup.session(chosen, adapter)
    longest = setup.folder.context or LONGEST
    settings = {"tasks": list(tasks), "task_manager": manager, "limit": limit, "num_fewshot": shots}
    with open_screen() as screen:
        model = model_of(session, setup.tokenizer, longest, recipe.train.tokens_at_once, screen.show)
        with base_weights(session):
            base = _evaluated(model, settings, data)
        tuned = _evaluated(model, settings, data)
    compared = figures(tasks, base, tuned)
    if not compared:
        raise DataError(f"no figure of {', '.join(tasks)} has a number for each row, so there is nothing to compare")
    _show(Console(), compared, tasks)
    values = {"tasks": list(tasks), "limit": limit, "shots": shots, "data": data and str(data)}
    values |= {"versions": base.get("versions"), "figures": [_finite(asdict(figure)) for figure in compared]}
    opened.write_json("benchmark.json", values)


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raises RecipeError for a name that lm-eval does not know."""
    for name in tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists them"
            raise RecipeError(f"--tasks {shorten(name, 60)}: lm-eval has no such task{hint}")


def _evaluated(model: Any, settings: Mapping[str, Any], data: Path | None) -> Any:
    """What lm-eval finds, every row with it. Raises DataError where the data of a task cannot be had."""
    from lm_eval import simple_evaluate

    with _sources(data):
        try:
            return simple_evaluate(model, **settings, bootstrap_iters=0, log_samples=True)
        except FinetuneError:
            raise
        except Exception as error:  # of datasets and of the tasks' own code: some twenty unrelated types
            reason = shorten(str(error) or type(error).__name__, 300)
            where = f"in {data}" if data else "on the hub; without a network, name local copies with --data FOLDER"
            raise DataError(f"{', '.join(settings['tasks'])}: cannot be measured ({reason}); looked {where}") from error


def _sources(data: Path | None) -> AbstractContextManager[None]:
    """Where the data of the tasks come from: a folder, and then nothing is reached; or the hub."""
    return local_data(data) if data else to_hub()


def _show(console: Console, compared: Sequence[Figure], tasks: Sequence[str]) -> None:
    table = figures_table("task", "metric", "rows", "base", "tuned", "change", "p", texts=2)
    table.columns[0].no_wrap = True
    others = [figure for figure in compared if figure.task not in tasks]
    for figure in [*(figure for figure in compared if figure.task in tasks), *others[:_SHOWN]]:
        low, high = figure.change
        by_test = figure.corrected is not None and figure.corrected < SIGNIFICANT
        clear = by_test or (figure.p_value is None and (low > 0 or high < 0))
        p = "" if figure.corrected is None else f"{figure.corrected:.2g}"
        cells = (
            figure.task, figure.metric, f"{figure.rows:,}", _cell(figure.base), _cell(figure.tuned),
            f"{low:+.3f} to {high:+.3f}", p,
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style="bold" if clear else "")
    console.print(table)
    if len(others) > _SHOWN:
        console.print(f"{len(others) - _SHOWN} more figures of single tasks are in benchmark.json")
    console.print("Intervals of 95 %; p-values of McNemar's exact test, corrected for their number (Holm).")


def _cell(share: Share) -> str:
    return f"{share.value:.3f} ({share.interval[0]:.3f} to {share.interval[1]:.3f})"


def _finite(value: Any) -> Any:
    """JSON has no infinity, which the interval of a single row is."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
