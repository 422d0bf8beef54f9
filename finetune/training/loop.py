"""The training loop: a generator of events. Set `Trainer.stopping` to stop it."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from backends.interface import Batch, FloatArray, Lost, NonFinite, OutOfMemory, Session
from finetune.data.rows import Example, Prepared
from finetune.disk.checkpoint import Checkpoint, Checkpoints, check_tensors
from finetune.errors import Diverged, Interrupted, MemoryExhausted
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.pair_losses import pair_loss
from finetune.events import (
    CheckpointDue,
    CheckpointSaved,
    Event,
    Finished,
    MemorySplit,
    Progress,
    RunStarted,
    StepDone,
    StoppedEarly,
    Validated,
    Work,
)
from finetune.recipe.schedule import Plan, hardly_falls, learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.training.average import Average
from finetune.training.loop_state import REMEDY, LoopState, has_learned
from finetune.training.objective import objective_of
from finetune.training.step_shares import Cut, every_micro, own_micro

_ROWS_NAMED = 4  # of a step that diverged
_LESS = {  # what needs less memory, by what trains
    "lora": "set quantize: 4bit, or adapt fewer layers (lora.layers)",
    "full": "or train an adapter (method: lora)",
}


@dataclass
class Trainer:
    """One run in memory: the session, the data, and where its checkpoints go."""

    session: Session
    prepared: Prepared
    recipe: Recipe
    checkpoints: Checkpoints

    def __post_init__(self) -> None:
        self.stopping = False  # set by whoever takes the events: stop after this step, or within this validation
        self.objective = objective_of(self.recipe)
        self.plan: Plan = make_plan(self.recipe, len(self.prepared.train.examples))
        self.average = Average(self.plan, self.recipe.method)
        self.majority = self.prepared.majority
        self.state = LoopState(self.recipe.train.tokens_at_once)
        self.best: Mapping[str, FloatArray] | None = None  # the adapter of the best validation
        self.validated: Evaluation | None = None  # the last validation, with its rows
        self.saved_at = time.monotonic()  # seconds; of the last checkpoint, or the beginning

    def limit_micro_batches(self, tokens: int) -> None:
        """For a new run: micro-batches of at most so many tokens, padding counted."""
        self.state.micro_tokens = tokens

    def restore(self, saved: Checkpoint) -> None:
        """Continue after a checkpoint. Raises IncompatibleState when its tensors do not fit the session, and
        Incompatible where it holds what no run writes.
        """
        folder = self.checkpoints.folder_of(saved.state.step)
        self.state = LoopState.from_json(saved.loop, str(folder / "loop.json"))
        check_tensors(saved, folder, REMEDY)
        self.session.set_state(saved.state)
        self.best = saved.best
        self.average.restore(saved.average or {})

    def events(self, untrained: Evaluation | None = None) -> Iterator[Event]:
        """Train to the end. Raises Interrupted, Diverged or MemoryExhausted, after the last good checkpoint.

        untrained: the validation before the first step, where it is known already.
        """
        step = self.session.get_state().step
        yield RunStarted(step, self.plan.steps, self.plan.steps_per_epoch, resumed=step > 0)
        if self._lacks_validation(step):  # a new run, or one that was stopped during a validation
            yield from self._finish_step(step, untrained if step == 0 else None)
        while step < self.plan.steps and not self.state.stopped_early:
            try:
                yield from self.step(step)
            except Lost:  # this process is whole
                yield from self._save(step)
                raise
            step += 1
            self.average.follow(step, self.session)
            yield from self._finish_step(step)
        yield Finished(step, self.state.best_step, self.state.best_loss)

    def _lacks_validation(self, step: int) -> bool:
        """Whether a validation is due after `step` and has not been made."""
        last = self.state.validations[-1].step if self.state.validations else -1
        return last != step and self.plan.evaluates_after(step)

    def _finish_step(self, step: int, known: Evaluation | None = None) -> Iterator[Event]:
        """What is due once `step` steps are done: a validation, a checkpoint. Raises Interrupted when asked to stop."""
        if self.plan.evaluates_after(step):
            try:
                yield from self._validate(step, known)
            except (Interrupted, Lost):
                yield from self._save(step)
                raise
            self.state.stopped_early = self._is_enough()
        if self.state.stopped_early:
            yield StoppedEarly(step, self.state.best_step, self.state.best_loss)
        interrupted = self.stopping
        if interrupted or self.state.stopped_early or self.plan.checkpoints_after(step) or self._long_ago():
            yield from self._save(step)
        if interrupted:
            raise Interrupted(f"stopped after step {step}")

    def step(self, step: int) -> Iterator[Event]:
        """One optimiser step after `step` done ones, repeated with smaller micro-batches while memory runs out."""
        examples = self._cut(step).examples(self.prepared.train.examples)
        last = step + 1 == self.plan.steps or self.plan.evaluates_after(step + 1)
        rate = learning_rate(self.recipe, self.plan, step)
        started = time.perf_counter()
        while True:
            cut = self._cut(step)
            try:
                micro = own_micro(self.session, self.objective.batches, cut, examples, last)
                result = self.objective.step(self.session, examples, micro, rate)
                break
            except OutOfMemory as error:
                self._split(step, every_micro(self.session, self.objective.batches, cut, examples), error)
            except NonFinite as error:
                raise _diverged(step + 1, error, examples, rate) from None
            yield MemorySplit(step, self.state.micro_tokens)
        self.state.loss_sum += result.loss * result.tokens
        self.state.loss_tokens += result.tokens
        yield StepDone(
            step=step + 1,
            epoch=(step + 1) / self.plan.steps_per_epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=result.tokens,
            useful_tokens=sum(len(example.tokens) for example in examples),
            seconds=time.perf_counter() - started,
            peak_bytes=self.session.peak_bytes(),
        )

    def _cut(self, step: int) -> Cut:
        train, prefixes = self.recipe.train, self.session.shares_prefixes
        return Cut(step, train.batch_size, self.recipe.seed, self.state.micro_tokens, prefixes)

    def _split(self, step: int, micro: list[Batch], error: OutOfMemory) -> None:
        """Halve the largest micro-batch of several rows. Raises MemoryExhausted when every one is a single row."""
        divisible = [batch.inputs.size for batch in micro if len(batch.inputs) > self.objective.together]
        if not divisible:
            raise MemoryExhausted(
                f"step {step + 1}: a single row of {micro[0].inputs.shape[1]} tokens does not fit in memory ({error}). "
                f"Set train.gradient_checkpointing: true, lower train.max_length, {_LESS[self.recipe.method]}"
            ) from None
        self.state.micro_tokens = max(divisible) // 2

    def _validate(self, step: int, known: Evaluation | None) -> Iterator[Event]:
        """Raises Interrupted when asked to stop on the way, Diverged for a loss that is not finite."""
        started = time.perf_counter()
        with self.average.within(self.session):
            evaluation = self.validated = known or (yield from self._evaluate(step))
        if not math.isfinite(evaluation.loss):
            raise Diverged(f"step {step}: the validation loss is {evaluation.loss}; lower train.learning_rate")
        better = evaluation.loss < self.state.best_loss
        event = Validated(
            step=step,
            epoch=step / self.plan.steps_per_epoch,
            train_loss=self.state.loss_sum / self.state.loss_tokens if self.state.loss_tokens else None,
            loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            token_accuracy=evaluation.token_accuracy,
            accuracy=evaluation.accuracy,
            best=better,
            seconds=time.perf_counter() - started,
        )
        self.state.loss_sum, self.state.loss_tokens = 0.0, 0
        self.state.without_better = 0 if better or not self._has_learned(event) else self.state.without_better + 1
        if better:
            self.state.best_step, self.state.best_loss = step, evaluation.loss
            self.best = self.average.result(self.session)
        self.state.validations.append(replace(event, seconds=0.0))
        yield event

    def _is_enough(self) -> bool:
        """Whether the last validation ends the run: patience is over, or `epochs: auto` asks for no more."""
        patience, told = self.recipe.train.early_stopping, self.state.validations
        if patience is not None and self.state.without_better >= patience:
            return True
        learned = [(one.step, one.loss) for one in told if self._has_learned(one)]
        ends = self.plan.open_end and self.plan.ends_epoch(told[-1].step) and self._has_learned(told[-1])
        return ends and hardly_falls(self.plan, learned)

    def _has_learned(self, validated: Validated) -> bool:
        """Before that an open end says nothing: a loss stays where answers are as good as blind, and then falls."""
        rows = len(self.prepared.valid.examples)
        return not self.plan.open_end or has_learned(validated, self.majority, rows)

    def _evaluate(self, step: int) -> Generator[Progress, None, Evaluation]:
        """All validation rows. Raises Interrupted between two batches when asked to stop."""
        limit = self.state.micro_tokens
        pairs = pair_loss(self.recipe)
        work = Work(
            evaluate(
                self.session, self.prepared, self.prepared.valid, name="validation", micro_tokens=limit, pairs=pairs
            )
        )
        for progress in work:
            yield replace(progress, step=step)
            if self.stopping and progress.done < progress.total:
                raise Interrupted(f"stopped during the validation after step {step}")
        return work.result

    def _long_ago(self) -> bool:
        """Whether the recipe asks for a checkpoint by the time since the last one."""
        minutes = self.recipe.train.checkpoint_minutes
        return minutes != "none" and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self, step: int) -> Iterator[Event]:
        yield CheckpointDue(step)
        state, loop = self.session.get_state(), self.state.to_json()
        path = self.checkpoints.save(state, loop, self.best, self.average.tensors)
        self.saved_at = time.monotonic()
        yield CheckpointSaved(step, str(path))


def _diverged(step: int, error: NonFinite, examples: list[Example], rate: float) -> Diverged:
    locations = ", ".join(example.location for example in examples[:_ROWS_NAMED])
    more = ", ..." if len(examples) > _ROWS_NAMED else ""
    return Diverged(
        f"step {step}: {error}. The step was not applied, and the last checkpoint is good. Rows of this step: "
        f"{locations}{more}. Lower train.learning_rate (now {rate:g}), or check those rows"
    )


def unsaved(session: Session, prepared: Prepared, recipe: Recipe, micro_tokens: int) -> Trainer:
    """For a few steps of which nothing is kept: it has no place for checkpoints."""
    trainer = Trainer(session, prepared, recipe, Checkpoints(Path(), {}))
    trainer.limit_micro_batches(micro_tokens)
    return trainer
