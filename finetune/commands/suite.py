"""`eval --suite`: the cases of a file asked of a run's base and tuned model, and whether enough of them pass."""

from __future__ import annotations

from finetune.console import Console
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_head import read_head
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import CasesFailed
from finetune.evaluation.suite import measure_suite
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.summary import print_suite
from finetune.training.suite_prompts import suite_again


def run(opened: RunFolder, recipe: Recipe, file: str, at_least: float | None, backend: str | None) -> None:
    """Prints the cases that fail, and writes suite.json. Raises CasesFailed where the share that surely passes is below
    `at_least`.
    """
    adapter = read_trained(opened)
    job, suite = with_progress(suite_again(recipe, backend, opened, file))
    check_run_base(opened, job.folder)
    result = with_progress(measure_suite(job.open(adapter), job.recipe, job.tokenizer, suite, head=read_head(opened)))
    print_suite(Console(), result)
    opened.write_json("suite.json", result.to_json())
    if at_least is not None and (why := result.shortfall(at_least)):
        raise CasesFailed(f"{why} (--at-least)")
