"""`suspects --prove`: trains again without the suspect rows, and compares."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Generator
from dataclasses import replace
from pathlib import Path

from backends.interface import Session, TrainState
from finetune.disk.checkpoint import Checkpoints
from finetune.disk.run_folder import RunFolder
from finetune.errors import DataError, Interrupted
from finetune.evaluation.evaluate import Evaluation, evaluate_held_out
from finetune.evaluation.intervals import standard_error
from finetune.evaluation.paired_changes import accuracy_change, loss_change, loss_decides
from finetune.events import Event, Progress, StepDone, Validated
from finetune.report.report import compare
from finetune.training.job import Job
from finetune.training.loop import Trainer
from finetune.training.ready_trainer import first_of_all, ready_trainer


def predicted_seconds(events: Collection[Event]) -> float:
    """Seconds that a run's training took, of its metrics: about what training it again takes."""
    return sum(event.seconds for event in events if isinstance(event, StepDone | Validated))


class _Deadline:
    """Says when the time is over, and how much of it is kept for what comes last."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.kept = 0.0  # seconds

    @property
    def stopping(self) -> bool:
        return time.monotonic() + self.kept > self._end


def without_rows(
    job: Job,
    session: Session,
    run: RunFolder | None,
    locations: Collection[str],
    seconds: float,
    name: str = "model without the suspects",
) -> Generator[Event, None, Evaluation | None]:
    """The held-out rows under the model that is trained without some rows. None where `seconds` do not suffice.

    session: of the base; its adapter is another afterwards. run: whose rate is taken; None: a race chooses one where
    the recipe leaves it open. Nothing is left on the disk. Raises DataError where no row would be left, Diverged,
    MemoryExhausted.
    """
    train, deadline = job.prepared.train, _Deadline(seconds)
    rest = tuple(example for example in train.examples if example.location not in locations)
    if not rest:
        raise DataError("every training row is suspect: there is nothing left to train on; look at the rows first")
    recipe = job.recipe.with_train(checkpoint_minutes="none")
    fewer = replace(job, recipe=recipe, prepared=replace(job.prepared, train=replace(train, examples=rest)))
    with tempfile.TemporaryDirectory(prefix="finetune-proof-") as folder:
        checkpoints, own = Checkpoints(Path(folder), {}), RunFolder(Path(folder))
        try:
            prepared, _ = yield from first_of_all(fewer, session, own, deadline)  # of these rows, not of the run's
            fewer = replace(fewer, prepared=prepared)
            trainer, _ = yield from ready_trainer(fewer, session, run or own, checkpoints, None, deadline)
            yield from _trained(trainer, deadline)
        except Interrupted:
            return None
    assert trainer.best is not None  # the validation before the first step is always a best one
    session.set_state(TrainState(trainer.state.best_step, trainer.best, {}))
    return (yield from evaluate_held_out(session, recipe, fewer.prepared, job.tokenizer, name))


def _trained(trainer: Trainer, deadline: _Deadline) -> Generator[Event, None, None]:
    """All steps. Raises Interrupted where no time would be left to measure the held-out rows."""
    held_out, valid = len(trainer.prepared.held_out.examples), len(trainer.prepared.valid.examples)
    for event in trainer.events():
        if isinstance(event, StepDone):
            yield Progress(event.step, "training again", event.step, trainer.plan.steps)
        if isinstance(event, Validated):
            deadline.kept = event.seconds * held_out / max(valid, 1)  # as the validations tell
        trainer.stopping = deadline.stopping


def verdict(rows: int, removed: int, whole: Evaluation, without: Evaluation) -> str:
    """What the proof says, in sentences. whole: the run's own model, trained on all rows."""
    said = compare(whole, without).verdict
    if said.startswith(("Better", "Mixed", "Not good yet")):
        result = "the model is better"
    else:
        result = "the model is worse" if said.startswith("Worse") else _no_clear_gain(whole, without)
    return f"Proof: trained without {removed:,} of {rows:,} training rows, {result}. {said}"


def _no_clear_gain(whole: Evaluation, without: Evaluation) -> str:
    """A gain of more than its standard error may be one, though these rows do not show it; less is none."""
    if loss_decides(whole, without):
        mean, interval, _ = loss_change(whole.results, without.results)
        gain, written = -mean, "loss {:+.4f}, {:+.4f} to {:+.4f}"
    else:
        mean, interval = accuracy_change(whole, without, of=100)
        gain, written = mean, "{:+.1f} points, {:+.1f} to {:+.1f}"
    if interval is None or interval[0] == interval[1]:
        return "nothing was gained"
    result = "a gain is not clear" if gain > standard_error(interval) else "nothing was gained"
    return f"{result} ({written.format(mean, *interval)})"
