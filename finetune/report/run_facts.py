"""Facts for the report: model, data files, training cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AliasChoices, Field

from finetune.events import Event, StepDone
from finetune.text import amount, duration
from finetune.training.forecast import predicted_peak
from finetune.training.job import Job


@dataclass(frozen=True)
class Facts:
    """Of a whole run, what was done before it was resumed included."""

    model: str
    data: dict[str, str]  # split -> where its rows come from
    rows: dict[str, int]  # split -> rows that are used
    steps: int
    seconds: float  # of the steps, validations and evaluations not counted
    tokens_per_second: float  # padding not counted
    peak_bytes: int
    # The peak, from sizes alone; None where they do not say. Runs of before call it foretold_bytes.
    predicted_bytes: Annotated[
        int | None, Field(validation_alias=AliasChoices("predicted_bytes", "foretold_bytes"))
    ] = None
    processes: int = 1  # that shared the steps; memory is the first one's
    averaged: bool = False  # whether an average over the steps was validated and kept

    def lines(self) -> Sequence[str]:
        data = "; ".join(f"{split} {source} ({self.rows[split]:,} rows)" for split, source in self.data.items())
        took = "no step"
        if self.steps:
            steps = f"{self.steps:,} step{'s' * (self.steps > 1)} in {duration(self.seconds)}"
            steps += f" by {self.processes} processes" if self.processes > 1 else ""
            took = f"{steps}, {self.tokens_per_second:,.0f} tokens/s, memory {amount(self.peak_bytes)} at most"
            took += "; their average was validated and kept" if self.averaged else ""
        return f"model: {self.model}", f"data: {data}", f"training: {took}"


def facts_of(job: Job, events: Iterable[Event], device: str, processes: int = 1, streamed: bool = False) -> Facts:
    """events: those of metrics.jsonl. processes: that share the steps. streamed: whether the model is."""
    recipe, prepared = job.recipe, job.prepared
    steps = [event for event in events if isinstance(event, StepDone)]
    seconds = sum(step.seconds for step in steps)
    named = {"train": recipe.data.train, "valid": recipe.data.valid, "test": recipe.data.test}
    apart = f"set apart of {recipe.data.train}" if prepared.parted else recipe.data.train  # else of the same folder
    return Facts(
        model=recipe.model.path + (f" at {recipe.model.revision}" if recipe.model.revision else ""),
        data={
            split.name: named[split.name] or (apart if split.name == "valid" else recipe.data.train)
            for split in prepared.splits
        },
        rows={split.name: len(split.examples) for split in prepared.splits},
        steps=len(steps),
        seconds=round(seconds, 3),
        tokens_per_second=round(sum(step.useful_tokens for step in steps) / seconds, 1) if seconds else 0.0,
        peak_bytes=max((step.peak_bytes for step in steps), default=0),
        predicted_bytes=predicted_peak(job, device, streamed),
        processes=processes,
        averaged=recipe.train.epochs == "auto",
    )
