"""Whether a run is better without some of its training rows: trained again without them, within a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Generator
from dataclasses import replace
from pathlib import Path

from backends.interface import Session, TrainState
from finetune.disk.adapter import start_from
from finetune.disk.checkpoint import Checkpoints
from finetune.errors import DataError, Interrupted
from finetune.evaluation.evaluate import Evaluation, evaluate_held_out
from finetune.events import Event, Progress, StepDone, Validated
from finetune.recipe.specs import lora_spec
from finetune.report.report import compare
from finetune.training.budget import starting_tokens
from finetune.training.job import Job
from finetune.training.loop import Trainer


def foretold(events: Collection[Event]) -> float:
    """Seconds that a run's training took, of its metrics: about what training it again takes."""
    return sum(event.seconds for event in events if isinstance(event, StepDone | Validated))


def without_rows(
    job: Job, session: Session, locations: Collection[str], seconds: float
) -> Generator[Event, None, Evaluation | None]:
    """The held-out rows under the model that is trained without some rows. None where `seconds` do not suffice.

    session: of the base; its adapter is another afterwards. Nothing is left on the disk. Raises DataError where no row
    would be left, Diverged, MemoryExhausted.
    """
    train = job.prepared.train
    rest = tuple(example for example in train.examples if example.location not in locations)
    if not rest:
        raise DataError("every training row is suspect: there is nothing left to train on; look at the rows first")
    recipe = job.recipe.model_copy(update={"train": job.recipe.train.model_copy(update={"checkpoint_minutes": "none"})})
    fewer = replace(job, recipe=recipe, prepared=replace(job.prepared, train=replace(train, examples=rest)))
    with tempfile.TemporaryDirectory(prefix="finetune-proof-") as folder:
        trainer = Trainer(session, fewer.prepared, recipe, Checkpoints(Path(folder), {}))
        trainer.limit_micro_batches((yield from starting_tokens(fewer, session)))
        if recipe.lora.start_from:
            start_from(session, Path(recipe.lora.start_from), lora_spec(recipe))
        if not (yield from _in_time(trainer, seconds)):
            return None
    assert trainer.best is not None  # the validation before the first step is always a best one
    session.set_state(TrainState(trainer.state.best_step, trainer.best, {}))
    return (yield from evaluate_held_out(session, recipe, fewer.prepared, job.tokenizer, "model without the suspects"))


def _in_time(trainer: Trainer, seconds: float) -> Generator[Event, None, bool]:
    """Trains. Whether that ended before `seconds` had passed, and time is left to measure the held-out rows."""
    end = time.monotonic() + seconds
    held_out, valid = len(trainer.prepared.held_out.examples), len(trainer.prepared.valid.examples)
    measuring = 0.0  # seconds, as the validations tell
    try:
        for event in trainer.events():
            trained = isinstance(event, StepDone)
            yield Progress(event.step, "training again", event.step, trainer.plan.steps) if trained else event
            if isinstance(event, Validated):
                measuring = event.seconds * held_out / max(valid, 1)
            trainer.stopping = time.monotonic() + measuring > end
    except Interrupted:
        return False
    return True


def verdict(rows: int, removed: int, whole: Evaluation, without: Evaluation) -> str:
    """What the proof says, in sentences. whole: the run's own model, trained on all rows."""
    said = compare(whole, without).verdict
    gained = said.startswith(("Better", "Mixed"))
    lost = said.startswith("Worse")
    result = "the model is better" if gained else "the model is worse" if lost else "nothing was gained"
    return f"Proof: trained without {removed:,} of {rows:,} training rows, {result}. {said}"
