"""What a run settles before its first step: how many tokens at a time, and whether blocks are computed again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from backends import registry
from backends.interface import Session
from finetune.events import Note
from finetune.training.budget import fitting_tokens, workload
from finetune.training.job import Job


def starting_tokens(job: Job, session: Session) -> Generator[Note, None, int]:
    """`tokens_that_fit`, said where they are not as many as the recipe asks for."""
    asked, free = job.recipe.train.micro_tokens, session.free_bytes()
    chosen = tokens_that_fit(job, session)
    if chosen != asked and free is not None:
        yield Note(0, f"micro-batches of at most {chosen:,} tokens: what fits in {free / 1e9:.1f} GB free")
    return chosen


def tokens_that_fit(job: Job, session: Session) -> int:
    """The tokens at a time with which a new run begins: as the recipe says, but no more than fit beside the model.

    A resumed run takes its checkpoint's number, so that its sums are cut the same way.
    """
    asked, free = job.recipe.train.micro_tokens, session.free_bytes()
    if free is None or not job.prepared.train.examples:
        return job.recipe.train.tokens_at_once
    work = workload(job.recipe, job.folder, job.prepared.train.examples)
    costs = registry.costs(job.backend, registry.device_kind(session.device))
    work = work.held_as(registry.describe(job.backend, work.model.device)["half"], costs.device)
    if asked != "auto" and work.memory(asked, costs).step <= free:
        return asked
    fits = fitting_tokens(work, costs, free)
    return fits if asked == "auto" else min(asked, fits)


def settle_recomputation(job: Job, earlier: bool | None) -> Generator[Note, None, Job]:
    """The job with `gradient_checkpointing: auto` decided, before its model is loaded.

    earlier: what a run that goes on decided when it began.
    """
    train = job.recipe.train
    if train.gradient_checkpointing != "auto":
        return job
    again = bool(earlier)
    if earlier is None and job.folder.weights and job.prepared.train.examples:
        device = job.recipe.device
        costs = registry.costs(job.backend, registry.device_kind(registry.describe(job.backend, device)["device"]))
        asked = None if train.micro_tokens == "auto" else train.micro_tokens
        free = registry.free_bytes(job.backend, device)
        work = workload(job.recipe, job.folder, job.prepared.train.examples).settled(costs, free, asked)
        again = work.model.checkpointing
        if again:
            text = "blocks are computed again in the backward pass: what they make does not fit"
            yield Note(0, f"{text} in {(free or 0) / 1e9:.1f} GB free")
    return replace(job, recipe=job.recipe.with_train(gradient_checkpointing=again))
