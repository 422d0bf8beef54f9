"""The loop: a generator of events. Nothing calls back into it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.interface import Batch, FloatArray, NonFinite, OutOfMemory, Session, StepResult
from finetune.data.collate import micro_batches, step_indices
from finetune.data.rows import Prepared
from finetune.disk import checkpoint as checkpoints
from finetune.errors import Diverged, Interrupted, MemoryExhausted
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.events import (
    CheckpointSaved,
    Event,
    Finished,
    MemorySplit,
    Report,
    RunStarted,
    StepDone,
    StoppedEarly,
    Validated,
)
from finetune.recipe.schedule import Plan, learning_rate, make_plan
from finetune.recipe.schema import Recipe


@dataclass
class LoopState:
    """What the loop itself remembers from step to step; JSON-able, and part of every checkpoint."""

    micro_tokens: int
    best_step: int = 0
    best_loss: float = math.inf
    without_better: int = 0  # validations since the best one
    loss_sum: float = 0.0  # since the last validation, weighted by tokens
    loss_tokens: int = 0
    stopped_early: bool = False
    validations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoopState:
        best = values["best_loss"]
        return cls(**{**values, "best_loss": math.inf if best is None else best})

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    def history(self) -> list[Validated]:
        return [Validated(**one) for one in self.validations]


@dataclass
class Trainer:
    """One run in memory: the session, the data, and where its checkpoints go."""

    session: Session
    prepared: Prepared
    recipe: Recipe
    folder: Path  # of the checkpoints
    identity: dict[str, Any]
    stop_asked: Callable[[], bool] = lambda: False
    report: Report = lambda what, done, total: None  # of a validation's progress; may raise Interrupted
    before_save: Callable[[], None] = lambda: None  # what a checkpoint goes on from is on the disk before it
    known: Evaluation | None = None  # the validation before the first step, where its figures are known already

    def __post_init__(self) -> None:
        self.plan: Plan = make_plan(self.recipe, len(self.prepared.train.examples))
        self.state = LoopState(self.recipe.train.tokens_at_once)
        self.best: Mapping[str, FloatArray] | None = None

    def restore(self, saved: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint: raises IncompatibleState when its tensors do not fit the session."""
        self.session.set_state(saved.state)
        self.state = LoopState.from_json(saved.loop)
        self.best = saved.best

    def events(self) -> Iterator[Event]:
        """Train to the end. Raises Interrupted, Diverged or MemoryExhausted after the last good checkpoint."""
        step = self.session.get_state().step
        yield RunStarted(step, self.plan.steps, self.plan.steps_per_epoch, resumed=step > 0)
        if not self._validated(step):  # a new run, or one that was stopped in the midst of a validation
            yield from self._after(step)
        while step < self.plan.steps and not self.state.stopped_early:
            yield from self._step(step)
            step += 1
            yield from self._after(step)
        yield Finished(step, self.state.best_step, self.state.best_loss)

    def _validated(self, step: int) -> bool:
        """Whether a validation that is due after `step` has been made."""
        made = self.state.validations[-1]["step"] if self.state.validations else -1
        return bool(made == step) or not self.plan.evaluates_after(step)

    def _after(self, step: int) -> Iterator[Event]:
        """What is due once `step` steps are done: a validation, a checkpoint. Raises Interrupted when asked to stop."""
        if self.plan.evaluates_after(step):
            try:
                yield self._validate(step)
            except Interrupted:
                yield self._save()
                raise
            patience = self.recipe.train.early_stopping
            self.state.stopped_early = patience is not None and self.state.without_better >= patience
        if self.state.stopped_early:
            yield StoppedEarly(step, self.state.best_step, self.state.best_loss)
        interrupted = self.stop_asked()
        if interrupted or self.state.stopped_early or self.plan.checkpoints_after(step):
            yield self._save()
        if interrupted:
            raise Interrupted(f"stopped after step {step}")

    def _step(self, step: int) -> Iterator[Event]:
        examples = self.prepared.train.examples
        indices = step_indices(len(examples), self.recipe.train.batch_size, self.recipe.seed, step)
        chosen = [examples[i] for i in indices]
        rate = learning_rate(self.recipe, self.plan, step)
        started = time.perf_counter()
        while True:
            micro = micro_batches(chosen, self.state.micro_tokens, self.session.shares_prefixes)
            try:
                result = self.session.step(micro, rate)
                break
            except OutOfMemory as error:
                self._split(step, micro, error)
            except NonFinite as error:
                places = ", ".join(one.place for one in chosen[:4])
                raise Diverged(
                    f"step {step + 1}: {error}. The step was not applied and the last checkpoint is good. "
                    f"Rows of this step: {places}{', ...' if len(chosen) > 4 else ''}. "
                    f"Lower train.learning_rate (now {rate:g}), or look at those rows"
                ) from None
            yield MemorySplit(step, self.state.micro_tokens)
        yield self._done(step + 1, result, rate, sum(len(one.tokens) for one in chosen), started)

    def _done(self, step: int, result: StepResult, rate: float, useful: int, started: float) -> StepDone:
        self.state.loss_sum += result.loss * result.tokens
        self.state.loss_tokens += result.tokens
        return StepDone(
            step=step,
            epoch=step / self.plan.steps_per_epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=result.tokens,
            useful_tokens=useful,
            seconds=time.perf_counter() - started,
            peak_bytes=self.session.peak_bytes(),
        )

    def _split(self, step: int, micro: list[Batch], error: OutOfMemory) -> None:
        """Halve the largest micro-batch that has rows to share out; give up when every one is a single row."""
        divisible = [batch.inputs.size for batch in micro if len(batch.inputs) > 1]
        if not divisible:
            raise MemoryExhausted(
                f"step {step + 1}: a single row of {micro[0].inputs.shape[1]} tokens does not fit in memory ({error}). "
                "Set train.gradient_checkpointing: true, lower train.max_length, set quantize: 4bit, "
                "or adapt fewer layers (lora.layers)"
            ) from None
        self.state.micro_tokens = max(divisible) // 2

    def _validate(self, step: int) -> Validated:
        """Raises Interrupted, from `report`, when asked to stop on the way."""
        started = time.perf_counter()
        found = self.known if self.known and step == 0 else self._evaluate()
        if not math.isfinite(found.loss):
            raise Diverged(f"step {step}: the validation loss is {found.loss}; lower train.learning_rate")
        better = found.loss < self.state.best_loss
        event = Validated(
            step=step,
            epoch=step / self.plan.steps_per_epoch,
            train_loss=self.state.loss_sum / self.state.loss_tokens if self.state.loss_tokens else None,
            loss=found.loss,
            perplexity=found.perplexity,
            token_accuracy=found.token_accuracy,
            accuracy=found.accuracy,
            best=better,
            seconds=time.perf_counter() - started,
        )
        self.state.loss_sum, self.state.loss_tokens = 0.0, 0
        self.state.without_better = 0 if better else self.state.without_better + 1
        if better:
            self.state.best_step, self.state.best_loss = step, found.loss
            self.best = self.session.get_state().adapter
        self.state.validations.append(asdict(replace(event, seconds=0.0)))
        return event

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.session,
            self.prepared,
            self.prepared.valid,
            micro_tokens=self.state.micro_tokens,
            report=self._progress,
        )

    def _progress(self, what: str, done: int, total: int) -> None:
        if done < total:  # that it is done the event will say
            self.report(what, done, total)

    def _save(self) -> CheckpointSaved:
        self.before_save()
        state = self.session.get_state()
        saved = checkpoints.Checkpoint(state, self.state.to_json(), self.best, self.identity)
        return CheckpointSaved(state.step, str(checkpoints.save(self.folder, saved)))
