"""Settles micro-batch tokens, recomputation and streaming before the first step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from backends import registry
from backends.interface import Session
from backends.memory_plan import first_adapted
from backends.streaming import folder_on_disk, frozen_file_bytes
from finetune.events import Note
from finetune.training.budget import Workload, fitting_tokens, held_here, workload
from finetune.training.job import Job
from finetune.training.read_ahead import kept_bytes


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
    work, costs = held_here(work, job.backend, session.device)
    left = free - work.made_later(costs)
    if asked != "auto" and work.memory(asked, costs).step <= left:
        return asked
    fits = fitting_tokens(work, costs, left)
    return fits if asked == "auto" else min(asked, fits)


def settle_memory(job: Job, earlier: bool | None) -> Generator[Note, None, Job]:
    """The job with `gradient_checkpointing: auto` decided, and whether its model is streamed, before it is loaded.

    earlier: what a run that goes on decided of the first when it began. No byte of a result depends on the second.
    """
    train = job.recipe.train
    unsettled, again = train.gradient_checkpointing == "auto", bool(earlier)
    if not job.folder.weights or not job.prepared.train.examples or not (unsettled or job.recipe.lora.layers != "all"):
        return replace(job, recipe=job.recipe.with_train(gradient_checkpointing=again)) if unsettled else job
    device = job.recipe.device
    free = registry.free_bytes(job.backend, device)
    work = workload(job.recipe, job.folder, job.prepared.train.examples)
    work, costs = held_here(work, job.backend, registry.describe(job.backend, device)["device"])
    work = replace(work, streamable=work.streamable and job.streamed is None)
    if unsettled and earlier is not None:
        work = replace(work, unsettled=False, model=replace(work.model, checkpointing=earlier))
    settled = work.settled(costs, free, None if train.micro_tokens == "auto" else train.micro_tokens)
    if settled.model.streamed:
        yield Note(0, _streaming_note(settled, kept_bytes(job.recipe, job.prepared, settled, costs.device), free or 0))
    if unsettled and earlier is None and settled.model.checkpointing:
        text = "blocks are computed again in the backward pass: what they make does not fit"
        yield Note(0, f"{text} in {(free or 0) / 1e9:.1f} GB free")
    recipe = job.recipe.with_train(gradient_checkpointing=settled.model.checkpointing) if unsettled else job.recipe
    return replace(job, recipe=recipe, streamed=settled.model.streamed)


def _streaming_note(work: Workload, states: int, free: int) -> str:
    frozen, blocks = first_adapted(work.adapted), work.architecture.blocks
    return (
        f"the model does not fit in {free / 1e9:.1f} GB free, so its {frozen} frozen blocks of {blocks} are read from "
        f"the disk, {frozen_file_bytes(work.architecture, frozen) / 1e9:.2f} GB in a pass: one for all rows, and one "
        f"for each token of an answer. What they make of the rows takes {states / 1e9:.2f} GB in {folder_on_disk()}"
    )
