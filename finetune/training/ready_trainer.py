"""Builds a run's trainer: start or checkpoint, micro-batch tokens, learning rate."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

from backends.interface import FloatArray, Session
from finetune.data.rows import Prepared
from finetune.disk.adapter import start_from
from finetune.disk.checkpoint import Checkpoint, Checkpoints
from finetune.disk.run_folder import RunFolder
from finetune.events import Event, Stoppable, stoppable
from finetune.recipe.specs import lora_spec
from finetune.training.head_first import head_first
from finetune.training.job import Job
from finetune.training.loop import Trainer
from finetune.training.memory_settings import starting_tokens
from finetune.training.pair_references import with_references
from finetune.training.rate_race import Race, choose_rate, with_rate
from finetune.training.read_ahead import reading_ahead


def first_of_all(
    job: Job, session: Session, run: RunFolder, by: Stoppable
) -> Generator[Event, None, tuple[Prepared, Mapping[str, FloatArray] | None]]:
    """What is computed once, before the base model is evaluated: the pairs' references, which are in the rows
    afterwards, and the head that learns alone, which is in the session then. by: who may stop it.
    """
    yield from stoppable(reading_ahead(job.recipe, job.prepared, session), by, "reading the frozen blocks")
    pairs = with_references(job, session, run)
    prepared = yield from stoppable(pairs, by, "scoring the pairs")
    return prepared, (yield from stoppable(head_first(job, session, run), by, "training the head"))


def ready_trainer(
    job: Job, session: Session, run: RunFolder, checkpoints: Checkpoints, saved: Checkpoint | None, by: Stoppable
) -> Generator[Event, None, tuple[Trainer, Race | None]]:
    """The trainer, and the race that chose its rate. saved: what a resumed run goes on from. by: who may stop the race.

    Raises Incompatible where the adapter to start from does not fit, or a file is not what a run writes; Interrupted;
    Diverged where no rate of a race learns.
    """
    recipe = job.recipe
    yield from stoppable(reading_ahead(recipe, job.prepared, session), by, "reading the frozen blocks")
    if recipe.lora.start_from:
        start_from(session, Path(recipe.lora.start_from), lora_spec(recipe))
    limit = (yield from starting_tokens(job, session)) if saved is None else recipe.train.tokens_at_once
    race = yield from stoppable(choose_rate(job, session, run, limit), by, "choosing the learning rate")
    trainer = Trainer(session, job.prepared, with_rate(recipe, race), checkpoints)
    if saved is None:
        trainer.limit_micro_batches(limit)
    else:
        trainer.restore(saved)
    return trainer, race
