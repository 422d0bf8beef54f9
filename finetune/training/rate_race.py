"""`train.learning_rate: auto`: four rates race for a few steps before the run; a clear winner moves the rule's rate."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from backends import registry
from backends.interface import Device, Session, TrainState
from backends.model_folder import ModelFolder
from finetune.data.collate import step_indices
from finetune.data.rows import Example, Prepared
from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder
from finetune.errors import Diverged
from finetune.evaluation.pair_evaluation import evaluate_pairs
from finetune.evaluation.pair_losses import pair_loss
from finetune.evaluation.scoring import row_losses
from finetune.events import Event, Note, Progress, StepDone, Work, result_of
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.training.job import Job
from finetune.training.loop import unsaved
from finetune.training.rate_rule import LANES, Start, starting_rate

Losses = NDArray[np.float64]  # [rows]
SHARE = 0.08  # of the run's predicted work: what a race may cost
RACE = "race of learning rates"  # of the progress, and of the forecast
JUDGED = 32  # validation rows at most
SMALLER = 4  # times: the steps of a race have fewer rows than the run's, so that there are more of them
CLEAR = 2.0  # standard errors by which a rate must be better than the rule's
LEAST_STEPS = 4  # of each rate; a shorter race tells nothing
OVERHEAD: Mapping[Device, int] = {"cpu": 100, "gpu": 2000}  # tokens computed in the time of a pass through the model


@dataclass(frozen=True)
class Course:
    """How long a race is."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    steps: int  # of each rate
    batch: int  # training rows of a step
    rows: int  # validation rows that each rate is judged on
    share: float  # of the run's predicted work

    @property
    def text(self) -> str:
        return (
            f"{self.steps} steps of {self.batch} training rows each, judged on {self.rows} validation rows, "
            f"{self.share:.1%} of the run's predicted work"
        )


@dataclass(frozen=True)
class Lap:
    """One rate's race."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    rate: float
    loss: float | None  # nats per supervised token of the validation rows; None: it was not a finite number


@dataclass(frozen=True)
class Race:
    """What the run's learning rate is, and why: race.json."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    chosen: float
    start: Start
    course: Course | None  # None: there is none, as `Start.no_race` says
    laps: tuple[Lap, ...]
    seconds: float

    def lines(self) -> list[str]:
        """For people: the rate and where it comes from, and the race's figures."""
        if self.course is None:
            return [f"learning rate {self.start.why}; {self.start.no_race}"]
        laps = ", ".join(f"{lap.rate:.1e} {'diverged' if lap.loss is None else f'{lap.loss:.3f}'}" for lap in self.laps)
        if self.chosen == min((lap.loss, lap.rate) for lap in self.laps if lap.loss is not None)[1]:
            won = "has the lowest loss"
        elif self.chosen == self.start.rate:
            won = "stays, since no rate between the ends of the race is clearly better"
        else:
            won = "is midway between the rule's and that of the lowest loss"
        return [
            f"learning rate: {self.start.why}",
            f"race of {len(self.laps)} rates: {self.course.text}, {self.seconds:.1f} s",
            f"rate {self.chosen:.1e} {won}: {laps}",
        ]


def course_of(recipe: Recipe, prepared: Prepared, device: Device) -> Course | None:
    """The longest race within SHARE of the run's predicted work; None where that is too short to tell anything, or a
    head has learned alone: its first steps beside an adapter are the worse the faster they are.

    Work is counted in tokens that pass through the model, so that the course is the same on every machine of a kind: a
    trained token passes three times, a measured one once. What labels and written answers cost is not counted.
    """
    examples = prepared.train.examples
    if not examples or not prepared.valid.examples or recipe.head_alone:
        return None
    plan = make_plan(recipe, len(examples))
    trained, judged = _mean_length(examples), _mean_length(prepared.valid.examples)
    once = OVERHEAD[device]

    def work(steps: int, batch: int) -> float:
        return steps * 3.0 * (batch * trained + once)

    run = work(plan.predicted, recipe.train.batch_size)
    batch, rows = max(recipe.train.batch_size // SMALLER, 1), min(JUDGED, len(prepared.valid.examples))
    judging = rows * judged + once
    steps = int((SHARE * run / len(LANES) - judging) / work(1, batch))
    if steps < LEAST_STEPS:
        return None
    return Course(steps, batch, rows, round(len(LANES) * (work(steps, batch) + judging) / run, 4))


def race_lines(recipe: Recipe, folder: ModelFolder, prepared: Prepared, backend: str) -> list[str]:
    """How the learning rate will be chosen, for people. backend: empty where none works."""
    start = starting_rate(recipe, folder, len(prepared.train.examples))
    by_rule = f"learning rate: {start.why}"
    if not backend:
        return [by_rule]
    course = course_of(recipe, prepared, registry.device_kind(registry.describe(backend, recipe.device)["device"]))
    rates = ", ".join(f"{rate:.1e}" for rate in start.lanes)
    return [by_rule, f"race of {rates}: {course.text}" if course else start.no_race]


def _mean_length(examples: Sequence[Example]) -> float:
    return sum(map(len, examples)) / len(examples)


def choose_rate(job: Job, session: Session, run: RunFolder, micro_tokens: int) -> Generator[Event, None, Race | None]:
    """The race that chose the run's rate, which is kept in race.json; None where the recipe names a rate.

    The session is afterwards as it was. A resumed run takes what is kept, or makes the same race again. Raises Diverged
    where no rate has a finite loss, MemoryExhausted, Incompatible for a file that no run writes.
    """
    if job.recipe.train.learning_rate != "auto":
        return None
    kept = read_json(run.race, Race, "delete it, and the race is run again")
    if kept is not None:
        return kept
    start = starting_rate(job.recipe, job.folder, len(job.prepared.train.examples))
    made = yield from race(session, job.recipe, job.prepared, start, micro_tokens)
    run.write_json(run.race.name, asdict(made))
    for line in made.lines():
        yield Note(0, line)
    return made


def with_rate(recipe: Recipe, race: Race | None) -> Recipe:
    """The recipe with the rate that a race chose."""
    if race is None:
        return recipe
    return recipe.with_train(learning_rate=race.chosen)


def race(
    session: Session, recipe: Recipe, prepared: Prepared, start: Start, micro_tokens: int
) -> Generator[Progress, None, Race]:
    """As `choose_rate`, where nothing is kept."""
    began = time.perf_counter()
    course = course_of(recipe, prepared, registry.device_kind(session.device))
    if course is None:
        return Race(start.rate, start, None, (), 0.0)
    before, laps, rows, total = session.get_state(), [], [], len(LANES) * course.steps
    for i, rate in enumerate(start.lanes):
        session.set_state(TrainState(0, before.adapter, {}))
        lap = Work(_lap(session, recipe, prepared, course, rate, micro_tokens))
        for progress in lap:
            yield replace(progress, done=i * course.steps + progress.done, total=total)
        loss, judged = lap.result
        laps.append(Lap(rate, loss))
        rows.append(judged)
    session.set_state(before)
    return Race(chosen_of(start, laps, rows), start, course, tuple(laps), round(time.perf_counter() - began, 3))


def _lap(
    session: Session, recipe: Recipe, prepared: Prepared, course: Course, rate: float, micro_tokens: int
) -> Generator[Progress, None, tuple[float | None, Losses]]:
    """The loss on validation rows after a short run at this rate, None where it is not a finite number; and each row's
    sum of losses.
    """
    short = recipe.with_train(learning_rate=rate, epochs=None, steps=course.steps, batch_size=course.batch)
    trainer = unsaved(session, prepared, short, micro_tokens)
    try:
        for step in range(course.steps):
            for event in trainer.step(step):
                if isinstance(event, StepDone):
                    yield Progress(0, RACE, event.step, course.steps)
    except Diverged:
        return None, np.array([])
    judges = [
        prepared.valid.examples[i] for i in step_indices(len(prepared.valid.examples), course.rows, recipe.seed, 0)
    ]
    if pairs := pair_loss(recipe):
        measured = result_of(evaluate_pairs(session, judges, micro_tokens, pairs, "race"))
        loss, rows = measured.loss, np.array([row.loss for row in measured.results])
    else:
        losses = result_of(row_losses(session, judges, micro_tokens))
        loss, rows = float(losses.loss.sum() / losses.tokens.sum()), losses.loss
    return (loss if math.isfinite(loss) else None), rows


def chosen_of(start: Start, laps: Sequence[Lap], rows: Sequence[Losses]) -> float:
    """The rule's rate; or where another between the lowest and the highest has a clearly lower loss, midway to it, as
    factors go.

    rows: of each lap the rows' losses. Clearly: by CLEAR standard errors of the difference on the same rows. A race is
    far shorter than the run, and so its winner errs: to high rates where a path must be walked first, to low ones where
    what is there already is worth keeping. A winner at either end shows that error alone; of one between, which is
    better than the rates on both sides, half of it is left. Where the rule's own rate has no finite loss, the best one
    is taken as it is. Raises Diverged where none has.
    """
    finished = [(lap.loss, lap.rate, judged) for lap, judged in zip(laps, rows, strict=True) if lap.loss is not None]
    if not finished:
        rates = ", ".join(f"{lap.rate:.1e}" for lap in laps)
        raise Diverged(f"no learning rate of the race ({rates}) has a finite loss; name one in train.learning_rate")
    _, best, lowest = min(finished, key=lambda lap: lap[:2])  # of equals the lower rate
    own = next((judged for _, rate, judged in finished if rate == start.rate), None)
    if own is None:
        return best
    if best in (laps[0].rate, laps[-1].rate):
        return start.rate
    gain = own - lowest
    clear = gain.sum() > CLEAR * gain.std() * math.sqrt(len(gain))
    return float(f"{math.sqrt(start.rate * best):.1e}") if clear else start.rate
