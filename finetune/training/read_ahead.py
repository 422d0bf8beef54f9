"""Rows that a streamed model will read, in one pass, and the disk space their states need."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from backends.interface import Batch, Device, Session
from backends.memory_plan import kept_states_bytes
from backends.streaming import rows_of
from finetune.data.collate import label_batches
from finetune.data.rows import Prepared
from finetune.evaluation.read_ahead import ahead
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.training.budget import Workload
from finetune.training.objective import objective_of

_AT_ONCE = 512  # rows that are collated together


def known_batches(recipe: Recipe, prepared: Prepared) -> Iterator[tuple[object, Batch]]:
    """Of training, validation and held-out rows: the answers that are learned, and each label after each prompt."""
    limit, objective = recipe.train.tokens_at_once, objective_of(recipe)
    for split in prepared.splits:
        for start in range(0, len(split.examples), _AT_ONCE):
            for batch in objective.batches(split.examples[start : start + _AT_ONCE], limit, False):
                yield split.name, batch
        if prepared.task == "classification" and not recipe.head and split is not prepared.train:
            prompts = [example.prompt_tokens for example in split.examples]
            yield from label_batches(prompts, prepared.label_tokens, limit, False)


def reading_ahead(recipe: Recipe, prepared: Prepared, session: Session) -> Generator[Progress, None, None]:
    """Before anything is measured or trained: one pass for all of them."""
    return ahead(session, known_batches(recipe, prepared))


def kept_bytes(recipe: Recipe, prepared: Prepared, work: Workload, device: Device) -> int:
    """Of the temporary file with what a streamed model's frozen blocks make of those rows."""
    lengths = {row.tobytes(): len(row) for _, batch in known_batches(recipe, prepared) for row in rows_of(batch)}
    return kept_states_bytes(sum(lengths.values()), work.architecture.hidden, work.model.number_bytes(device))
