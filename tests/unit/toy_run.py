"""A short run on the reference backend: rows of random tokens, a recipe, and sessions that fail when told to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.interface import Batch, LoraSpec, ModelSpec, NonFinite, OptimSpec, OutOfMemory, Scores, Session
from finetune.data.rows import Example, Prepared, Split
from finetune.disk.checkpoint import Checkpoints
from finetune.disk.run_folder import RunFolder
from finetune.events import Event, Progress, Result, StepDone, Work
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import Recipe
from finetune.report.report import Report
from finetune.run import Run
from finetune.training.job import Job, making_ready
from finetune.training.loop import Trainer

LABELS = ("no", "yes", "perhaps")
LABEL_TOKENS = ((5,), (6, 7), (6, 8, 9))
STOP = frozenset({2})
VOCABULARY = 32


def model_folder(folder: Path) -> Path:
    """All that the reference backend needs: it makes its own weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return folder


def session(folder: Path, dropout: float = 0.2, seed: int = 0) -> Session:
    lora = LoraSpec(rank=2, alpha=4.0, dropout=dropout)
    return registry.open_session("reference", ModelSpec(model_folder(folder)), lora, OptimSpec(), seed)


def dataset(name: str, rows: int, seed: int) -> Split:
    """Random prompts of 2 to 20 tokens, each with a label and the end token after it."""
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        prompt = rng.integers(10, VOCABULARY, rng.integers(2, 21))
        label = row % len(LABELS)
        tokens = np.array([*prompt, *LABEL_TOKENS[label], *STOP], np.int32)
        weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        location, text = f"{name}.jsonl:{row + 1}", f"question {row}"
        examples.append(Example(tokens, weights, location, LABELS[label], text, len(prompt), len(tokens) - 1))
    return Split(name=name, rows=rows, examples=tuple(examples))


def prepared(train: int = 13, valid: int = 7, task: str = "classification") -> Prepared:
    labels, label_tokens = (LABELS, LABEL_TOKENS) if task == "classification" else ((), ())
    return Prepared(
        task=task,  # type: ignore[arg-type]
        format="classification",
        template="plain",
        train=dataset("train", train, 1),
        valid=dataset("valid", valid, 2),
        labels=labels,
        label_tokens=label_tokens,
        stop_tokens=STOP,
    )


def recipe(**sections: Any) -> Recipe:
    """13 rows in steps of 4: 4 steps an epoch, the last of one row."""
    train = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02, "checkpoint_every": 3} | sections.pop("train", {})
    values = {"model": {"path": "."}, "data": {"train": "train.jsonl"}, "evaluate": {"every": 2}, "train": train}
    return check_recipe(values | sections)


def trainer(
    folder: Path, live: Session | None = None, asked: Recipe | None = None, rows: Prepared | None = None
) -> Trainer:
    return Trainer(
        session=live or session(folder / "model"),
        prepared=rows or prepared(),
        recipe=asked or recipe(),
        checkpoints=Checkpoints(folder / "checkpoints", {"who": "a toy"}),
    )


def curve(events: Sequence[object]) -> list[tuple[int, float, float, float, int]]:
    """What of the steps is the same in every run; seconds and memory are not."""
    return [(e.step, e.loss, e.grad_norm, e.learning_rate, e.tokens) for e in events if isinstance(e, StepDone)]


def run_to_report(
    job: Job,
    folder: RunFolder,
    resume: bool = False,
    events: list[Event] | None = None,
    stop: Callable[[Event], bool] = lambda event: False,
) -> Report:
    """A run as the commands do it, without a screen. events: gets its events. stop: asks it to stop after an event."""
    run = Run(job, folder)
    work = Work(run.events(resume))
    for event in work:
        if events is not None:
            events.append(event)
        run.stopping = run.stopping or stop(event)
    return work.result


def result_of(events: Generator[Event, None, Result]) -> Result:
    """What long work returns; its events are dropped, and its progress must say how far it has come."""
    work = Work(events)
    for event in work:
        assert not isinstance(event, Progress) or 0 <= event.done <= event.total
    return work.result


def load_job(recipe: Recipe, backend: str | None = None) -> Job:
    return result_of(making_ready(recipe, backend))


class Killed(BaseException):
    """What no code of a run catches: as a run that is killed, it saves nothing more."""


def run_until_killed(job: Job, folder: RunFolder, step: int) -> None:
    """A run that ends between a step and the checkpoint after it."""

    def kill(event: Event) -> bool:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed
        return False

    with contextlib.suppress(Killed):
        run_to_report(job, folder, stop=kill)
    assert not folder.report.exists()


class Wrapped:
    """A session that is another's, but for what a subclass changes."""

    def __init__(self, inner: Session) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Small(Wrapped):
    """Out of memory above `limit` padded tokens in one batch, or above `prompts` prompts at once."""

    def __init__(self, inner: Session, limit: int, prompts: int = 100) -> None:
        super().__init__(inner)
        self.limit, self.prompts, self.largest = limit, prompts, 0

    def _take(self, size: int) -> None:
        if size > self.limit:
            raise OutOfMemory(f"{size} tokens")
        self.largest = max(self.largest, size)

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
        for batch in micro:
            self._take(batch.inputs.size)
        return self.inner.step(micro, lr, total)

    def score(self, batch: Batch) -> Scores:
        self._take(batch.inputs.size)
        return self.inner.score(batch)

    def generate(self, prompts: Sequence[Sequence[int]], *rest: Any, **named: Any) -> list[list[int]]:
        if len(prompts) > self.prompts:
            raise OutOfMemory(f"{len(prompts)} prompts")
        return self.inner.generate(prompts, *rest, **named)


class Poisoned(Wrapped):
    """A loss that is not finite: in training step `step`, or in every score from `scores` steps on."""

    def __init__(self, inner: Session, step: int | None = None, scores: int | None = None) -> None:
        super().__init__(inner)
        self.bad_step, self.bad_scores = step, scores

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> Any:
        if self.inner.get_state().step + 1 == self.bad_step:
            raise NonFinite("the loss is nan")
        return self.inner.step(micro, lr, total)

    def score(self, batch: Batch) -> Scores:
        found = self.inner.score(batch)
        if self.bad_scores is None or self.inner.get_state().step < self.bad_scores:
            return found
        return replace(found, logprob=found.logprob * np.float32(np.nan))
