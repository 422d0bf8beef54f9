"""Predicted time of each part of a whole run, from sizes alone."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

from backends import registry
from backends.interface import BackendError, Device, OutOfMemory, Session
from backends.process_group import side_by_side
from finetune.data.collate import step_indices
from finetune.data.pair_batches import as_one
from finetune.data.rows import Prepared
from finetune.data.tokenizer import answer_text
from finetune.errors import Diverged
from finetune.evaluation.analysis import Questions
from finetune.evaluation.read_ahead import AHEAD
from finetune.evaluation.samples import Sampler
from finetune.evaluation.scoring import row_losses
from finetune.events import Outlook, result_of
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.training.budget import Workload, imbalance, workload
from finetune.training.extra_evaluations import Beside, Seconds
from finetune.training.head_first import WHAT
from finetune.training.job import Job
from finetune.training.loop import unsaved
from finetune.training.memory_settings import tokens_that_fit
from finetune.training.pair_references import REFERENCES
from finetune.training.rate_race import RACE, course_of
from finetune.training.rate_rule import LANES
from finetune.training.sampled_steps import Rows
from finetune.training.speed import Speed, rate_here

LONGEST = 1.0  # seconds that the rows may take which are timed before a run, or a step of its training
ENOUGH_STEPS = 40  # of a run, beside which three are little
LEARNING = 12  # steps after which the most probable token is a label, as a rule
TIMED_RATE = 1e-6  # nothing is kept of what such steps learn


def look_ahead(job: Job, session: Session, questions: Questions) -> Outlook:
    """Of a run on this machine, whose matrix products are timed for a moment, and then the loaded model's own rows."""
    examples = job.prepared.train.examples
    free = session.free_bytes()
    return Outlook(
        step=0,
        title=f"{job.recipe.model.path} on {job.backend} ({session.device}), {len(examples):,} rows",
        steps=make_plan(job.recipe, len(examples)).steps,
        validations=validations(job.recipe, job.prepared),
        seconds=_predicted(job, session, questions),
        chance=1 / len(job.prepared.labels) if job.prepared.labels else None,
        majority=job.prepared.majority,
        memory=None if free is None else free + session.peak_bytes(),
    )


def _predicted(job: Job, session: Session, questions: Questions) -> dict[str, float]:
    """Nothing of a model that no files describe, as the toys of the reference backend."""
    try:
        work = workload(job.recipe, job.folder, job.prepared.train.examples)
    except BackendError:
        return {}
    work = replace(work, model=replace(work.model, streamed=bool(job.streamed)))
    costs = registry.costs(job.backend, registry.device_kind(session.device))
    count = side_by_side(session)  # each process computes as fast as this one
    speed = Speed.of(costs, rate_here(job.backend, work.model) * count / imbalance(work, count), count)
    tokens = tokens_that_fit(job, session)
    if count == 1:
        seconds = Seconds(job.recipe, job.prepared, work, speed, tokens)
        speed = replace(speed, slower=timed(session, seconds), training_slower=timed_steps(session, seconds))
    return seconds_of_parts(job.recipe, job.prepared, work, speed, tokens, Beside(questions, job.suite))


def timed(session: Session, seconds: Seconds) -> float:
    """How many times as long as predicted the loaded model takes to read a few rows: the median of three times.

    As many rows as take LONGEST. 1.0 where one alone would take longer, and where blocks are frozen: what they make of
    rows is kept after the first time.
    """
    if seconds.work.frozen:
        return 1.0
    rows, tokens = [], 0
    for example in map(as_one, seconds.prepared.train.examples):
        if (tokens := tokens + len(example)) > seconds.micro_tokens:
            break
        rows.append(example)
    while rows and (expected := seconds.reading(rows)) > LONGEST:
        del rows[len(rows) // 2 :]
    if not rows:
        return 1.0
    taken = []
    try:
        for _ in range(4):
            began = time.perf_counter()
            result_of(row_losses(session, rows, seconds.micro_tokens))
            taken.append(time.perf_counter() - began)
    except OutOfMemory:
        return 1.0
    return median(taken[1:]) / expected  # the first chooses kernels


def timed_steps(session: Session, seconds: Seconds) -> float | None:
    """The same of the run's second and third step, after which the session is as it was.

    None where a step would take longer than LONGEST, where three are more than a small part of the run, where the whole
    model trains, where blocks are frozen, and where a step needs what the untrained model thinks of its rows.
    """
    work, recipe, expected = seconds.work, seconds.recipe, []
    few = make_plan(recipe, len(work.examples)).predicted < ENOUGH_STEPS
    if few or work.lora.whole or work.frozen or recipe.preferences:
        return None
    for step in range(3):
        rows = [work.examples[i] for i in step_indices(len(work.examples), work.batch_size, work.seed, step)]
        expected.append(replace(work, examples=rows, batch_size=len(rows)).seconds(seconds.speed, seconds.micro_tokens))
    if max(expected) > LONGEST:
        return None
    short = recipe.with_train(learning_rate=TIMED_RATE, epochs=None, steps=len(expected))
    trainer = unsaved(session, seconds.prepared, short, seconds.micro_tokens)
    before, taken = session.get_state(), []
    try:
        for step in range(len(expected)):
            began = time.perf_counter()
            for _ in trainer.step(step):
                pass
            taken.append(time.perf_counter() - began)
    except (Diverged, OutOfMemory):
        return None
    finally:
        session.set_state(before)
    return sum(taken[1:]) / sum(expected[1:])  # the first chooses kernels


def sampler_of(job: Job) -> Sampler:
    """Writes answers only where the recipe's own evaluation does."""
    asked, stop = job.recipe.evaluate, job.prepared.stop_tokens
    most = asked.max_tokens if asked.generate else 0
    return Sampler(job.prepared, most, lambda tokens: answer_text(job.tokenizer, tokens, stop))


def validations(recipe: Recipe, prepared: Prepared, most: int | None = None) -> int:
    """In the whole run or its first `most` steps, the one before the first step included."""
    plan = make_plan(recipe, len(prepared.train.examples))
    steps = plan.predicted
    every = {*range(0, steps, plan.evaluate_every), *(range(0, steps, plan.steps_per_epoch) if plan.open_end else ())}
    return sum(plan.evaluates_after(step) for step in {*every, steps} if most is None or step <= most)


def seconds_of_parts(
    recipe: Recipe, prepared: Prepared, work: Workload, speed: Speed, micro_tokens: int, asked: Beside | None = None
) -> dict[str, float]:
    """In the order of the run; the keys are "training" and the names of `Progress.what`.

    micro_tokens: that training and validation compute together. asked: beside the held-out rows.
    """
    plan = make_plan(recipe, len(prepared.train.examples))
    seconds = Seconds(recipe, prepared, work, speed, recipe.train.tokens_at_once)
    in_training = replace(seconds, micro_tokens=micro_tokens)
    held = [example for split in (prepared.valid, prepared.test) if split for example in split.examples]
    measured = seconds.evaluation(prepared.held_out.examples)
    measured_again = seconds.evaluation(prepared.held_out.examples, known=recipe.evaluate.base)
    first = in_training.evaluation(prepared.valid.examples)
    validated = in_training.evaluation(prepared.valid.examples, known=True)
    by_base = prepared.held_out is prepared.valid and recipe.evaluate.base and not recipe.lora.start_from
    untrained = 0 if by_base else 1  # validations before the first step; the base model's may serve
    trained, early = validations(recipe, prepared) - 1, validations(recipe, prepared, LEARNING) - 1
    # Once a model has learned that labels follow, the most probable token is one of them, and nothing more is asked.
    short = plan.predicted <= LEARNING or not all(len(label) == 1 for label in prepared.label_tokens)
    learned = ("loss", "labels") if short else ("loss",)
    parts = {AHEAD: work.read_seconds()} if work.model.streamed else {}
    parts |= head_first(recipe, prepared, seconds)
    parts |= {f"base model: {name}": t for name, t in measured.items()} if recipe.evaluate.base else {}
    if recipe.preferences and recipe.preferences.refers:
        parts[REFERENCES] = seconds.reading((*work.examples, *held))
    parts |= racing(recipe, prepared, in_training)
    epochs = plan.predicted / plan.steps_per_epoch
    parts["training"] = epochs * work.seconds(speed, micro_tokens)
    if recipe.preferences:  # pairs are scored before their gradient is known
        parts["training"] += epochs * in_training.reading(work.examples)
    for name in [name for name in ("loss", "labels") if name in validated]:
        if (times := trained if name in learned else early) + untrained:
            parts[f"validation: {name}"] = untrained * first[name] + times * validated[name]
    parts |= {f"tuned model: {name}": t for name, t in measured_again.items() if name in (*learned, "answers")}
    models = ("base model", "tuned model") if recipe.evaluate.base else ("tuned model",)
    return parts | (seconds.beside(asked, models) if asked else {})


def head_first(recipe: Recipe, prepared: Prepared, seconds: Seconds) -> dict[str, float]:
    """Seconds of the one pass over the rows that a head alone needs."""
    if not recipe.head_alone:
        return {}
    examples = (*prepared.train.examples, *prepared.valid.examples)
    return {WHAT: seconds.passes(Rows.of([len(example) - 1 for example in examples]), len(examples))}


def racing(recipe: Recipe, prepared: Prepared, seconds: Seconds) -> dict[str, float]:
    """Of the race that chooses the learning rate, where there is one."""
    device: Device = "gpu" if seconds.speed.beside else "cpu"
    course = course_of(recipe, prepared, device) if recipe.train.learning_rate == "auto" else None
    if course is None:
        return {}
    work = replace(seconds.work, batch_size=course.batch)
    steps_per_epoch = -(-len(work.examples) // course.batch)
    step = work.seconds(seconds.speed, seconds.micro_tokens) / steps_per_epoch
    judges = prepared.valid.examples
    judging = seconds.reading(judges) * course.rows / len(judges)
    return {RACE: len(LANES) * (course.steps * step + judging)}
