"""How much general text to read for the forgetting measurement, as a share of the run's own work."""

from __future__ import annotations

from backends.interface import BackendError
from finetune.data.rows import Prepared
from finetune.evaluation.analysis import run_tokens
from finetune.evaluation.forgetting import GeneralText, general_text
from finetune.recipe.schema import Recipe
from finetune.training.budget import Workload, workload
from finetune.training.job import Job
from finetune.training.predicted_time import seconds_of_parts
from finetune.training.rate_race import RACE
from finetune.training.sampled_steps import Rows
from finetune.training.speed import Speed

FORGETTING = 0.04  # of a run's operations
PIECE = 32  # tokens, about


def general_text_for(job: Job) -> GeneralText:
    """None where the recipe asks for none, or the run is too short for enough of it."""
    if not job.recipe.evaluate.forgetting or job.recipe.head or not job.prepared.train.examples:
        return GeneralText()
    try:
        work = workload(job.recipe, job.folder, job.prepared.train.examples)
    except BackendError:  # a model that no files describe, as the toys of the reference backend
        most = FORGETTING * run_tokens(job.recipe, job.prepared)
    else:
        most = affordable(job.recipe, job.prepared, work)
    return general_text(job.tokenizer, int(most), job.folder.vocabulary)


def affordable(recipe: Recipe, prepared: Prepared, work: Workload) -> float:
    """Tokens of general text, all of which pass the head.

    Answers that a run writes are not counted among what it computes: most end before they are as long as they may be.
    """
    parts = seconds_of_parts(recipe, prepared, work, Speed(1.0), recipe.train.tokens_at_once)
    parts.pop(RACE, None)  # a rate that is named asks for as much
    parts["training"] += work.epochs * (work.operations() - work.seconds(Speed(1.0), recipe.train.tokens_at_once))
    parts["training"] *= computed_share(prepared, recipe.train.batch_size)
    whole = sum(operations for name, operations in parts.items() if not name.endswith("answers"))
    return FORGETTING * whole * PIECE / work.scoring(Rows.of([PIECE]), PIECE)


def computed_share(prepared: Prepared, batch_size: int) -> float:
    """Of the tokens of a step's rows, those that are computed: what all rows begin with is, once."""
    rows = [example.tokens.tolist() for example in prepared.train.examples]
    first, last = min(rows), max(rows)  # all others stand between them, and begin with what both begin with
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    mean, together = sum(map(len, rows)) / len(rows), min(batch_size, len(rows))
    return 1 - shared * (together - 1) / (together * mean)
