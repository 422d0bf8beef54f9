"""`finetune search`: trials of other settings beside the recipe's own, within a budget of time.

A trial is a run: it trains to the same bytes as `finetune train` with its settings. The recipe as it is has its whole
run; the others stop after a third of their steps, and the best third of them goes on from a checkpoint to the end: one
round of successive halving (Jamieson and Talwalkar, 2016). The next best follow while time is left. Rows are read once
for all; the base is measured once on the validation rows; trials of the same adapter's shape share a loaded model, and
what frozen blocks make of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from backends.interface import Session
from finetune.data.rows import Prepared
from finetune.disk.atomic import remove, rename, write_file
from finetune.disk.checkpoint import Checkpoints, load_newest
from finetune.disk.identity import identity_of
from finetune.disk.metrics import MetricsFile
from finetune.disk.run_folder import RunFolder
from finetune.disk.run_list import BEST
from finetune.errors import Diverged, Interrupted, RecipeError
from finetune.evaluation.analysis import Questions
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.pair_evaluation import mean_loss
from finetune.evaluation.pair_losses import pair_loss
from finetune.events import Event, Note, Progress, StepDone, Stoppable, Validated, stoppable
from finetune.recipe.load import dump_recipe
from finetune.recipe.schedule import make_plan
from finetune.recipe.specs import lora_spec
from finetune.text import duration
from finetune.training.head_first import head_first
from finetune.training.job import Job
from finetune.training.loop import Trainer
from finetune.training.pair_references import REFERENCES, with_references
from finetune.training.predicted_time import look_ahead
from finetune.training.rate_rule import starting_rate
from finetune.training.ready_trainer import ready_trainer
from finetune.training.search_ledger import SPARE, Stage, read_ledger
from finetune.training.search_sessions import TrialSessions
from finetune.training.search_trials import Trial, compared_after, going_on, most_that_fit, trials_of

SPARED = 2  # trials that are not among those that go on, but may where time is left
MEASURING = 1.5  # times what both models' measurements take: the analysis, and a model that is loaded again
AT_THE_END = (REFERENCES, "base model", "tuned model")  # of a run's predicted parts


class BudgetTooShort(RecipeError):
    """It does not suffice for the recipe itself."""


class Search:
    """One search in its folder, new or gone on with. `events` does all but the winner's own measurement."""

    def __init__(self, job: Job, folder: RunFolder, by: Stoppable, began: float | None = None) -> None:
        """began: time.monotonic, from which the ledger's budget counts; None: from now on.

        Raises Incompatible without a ledger, or for one that no search writes.
        """
        self.job, self.folder, self._by = job, folder, by
        self.ledger = read_ledger(folder.path)
        rows = len(job.prepared.train.examples)
        start = starting_rate(job.recipe, job.folder, rows)
        modules = job.folder.lora_modules(lora_spec(job.recipe)) if job.folder.weights else {}
        self.trials = trials_of(job.recipe, start, modules)
        self._began = (time.monotonic() if began is None else began) - self.ledger.spent
        self._sessions = TrialSessions(self.trials, lambda trial: self.job_of(trial).open())
        self._rows: dict[Trial, Prepared] = {}  # by the adapter's shape: those of training and validation, as learned
        self._base: Evaluation | None = None
        self._start = 0.0  # seconds of the last stage before its first step: loading, the base, a head alone

    def run_of(self, trial: int) -> RunFolder:
        return RunFolder(self.folder.path / "trials" / f"{trial:02}")

    @property
    def best(self) -> RunFolder:
        return RunFolder(self.folder.path / BEST)

    def job_of(self, trial: int) -> Job:
        """Others than the recipe itself may have other frozen blocks, and so have to be streamed or not."""
        streamed = self.job.streamed or None
        return replace(self.job, recipe=self.trials[trial].recipe(self.job.recipe), streamed=streamed)

    def steps_of(self, trial: int) -> int:
        """The longest that it may be."""
        return make_plan(self.job_of(trial).recipe, len(self.job.prepared.train.examples)).steps

    def stop_of(self, trial: int) -> int:
        """Its step after which it is compared."""
        return compared_after(self.job_of(trial).recipe, len(self.job.prepared.train.examples))

    def events(self) -> Generator[Event, None, int]:
        """The winner, whose run is then in `best` with all its steps. Raises Interrupted, BudgetTooShort, Diverged."""
        if self.ledger.winner is None:
            if not self.ledger.stages:  # one that goes on has made steps of which no stage tells
                yield from self._stage(0, max(self.stop_of(0) // 3, 1))
                self._refuse_short_budget()
            yield from self._stage(0, self.steps_of(0))
            others = list(range(1, self._planned() + 1))
            for trial in self._by_shape(others):
                yield from self._within_budget(trial, self.stop_of(trial))
            kept, first = self._kept(others), going_on(len(others))
            for trial in self._by_shape(kept[:first]):
                yield from self._within_budget(trial, self.steps_of(trial))
            for trial in kept[first:]:
                if self.ledger.skipped:
                    break
                yield from self._within_budget(trial, self.steps_of(trial))
            self.ledger.decide()
            self._write()
        self._sessions.close()  # its run opens a model of its own
        winner = self.ledger.winner
        assert winner is not None
        if not self.best.path.exists():
            rename(self.run_of(winner).path, self.best.path)
        if (rest := self.folder.path / "trials").exists():
            remove(rest)
        return winner

    def _refuse_short_budget(self) -> None:
        """After the first stage. Raises BudgetTooShort."""
        (stage,) = self.ledger.stages
        left = 0 if stage.finished else self.steps_of(0) - stage.steps
        whole = self.ledger.predicted(0) + SPARE * (stage.seconds - self._start) / stage.steps * left
        if whole > self.ledger.budget:
            takes, enough = duration(whole), math.ceil(whole * 2 / 60)
            raise BudgetTooShort(
                f"--budget: one run takes about {takes} here, and the budget is {duration(self.ledger.budget)}; allow "
                f"--budget {enough}m"
            )

    def _planned(self) -> int:
        """How many others, once the recipe is done: its first steps, which are slower, say too little of their time."""
        if self.ledger.others is None:
            left = self.ledger.budget - self.ledger.predicted(0)
            others = range(1, len(self.trials))
            stops, longest = [*map(self.stop_of, others)], [*map(self.steps_of, others)]
            self.ledger.others = most_that_fit(stops, longest, left / SPARE / self.ledger.per_step)
            self._write()
        return self.ledger.others

    def _within_budget(self, trial: int, steps: int) -> Iterator[Event]:
        """The stage, unless its time would be missing at the end."""
        last = self.ledger.last(trial)
        if trial in self.ledger.skipped or self.ledger.stage(trial, steps):
            return
        if self.ledger.predicted(steps - (last.steps if last else 0)) > self.ledger.budget:
            self.ledger.skipped.append(trial)
            self._write()
            return
        yield from self._stage(trial, steps)

    def _by_shape(self, trials: list[int]) -> list[int]:
        """Those that share a session one after the other."""
        return sorted(trials, key=lambda i: (str(self.trials[i].rank), str(self.trials[i].targets), i))

    def _kept(self, trials: list[int]) -> list[int]:
        """Those that may go on, the best first, of equals the first; their checkpoints alone are kept."""
        stages = [stage for trial in trials if (stage := self.ledger.last(trial))]
        alive = sorted((stage.loss, stage.trial) for stage in stages if stage.loss is not None)
        kept = [trial for _, trial in alive[: going_on(len(trials)) + SPARED]]
        for trial in set(trials) - set(kept):
            if (folder := self.run_of(trial).path).exists():
                remove(folder)
        return kept

    def _write(self) -> None:
        self.ledger.spent = round(time.monotonic() - self._began, 3)
        self.ledger.write(self.folder)

    def _stage(self, trial: int, steps: int) -> Iterator[Event]:
        """The trial up to that step, or to its end; nothing where that is done. Raises Interrupted."""
        if self.ledger.stage(trial, steps):
            return
        began = time.monotonic()
        try:
            at, loss, finished = yield from self._trained(trial, steps)
        except Diverged:
            at, loss, finished = steps, None, True
        finally:
            self._write()
        self.ledger.stages.append(Stage(trial, at, loss, round(time.monotonic() - began, 3), finished))
        self._write()
        yield Note(at, self.ledger.told(self.trials[trial].settings))

    def _trained(self, trial: int, steps: int) -> Generator[Event, None, tuple[int, float | None, bool]]:
        """(steps done, lowest validation loss, whether it is at its end)."""
        began, job, run = time.monotonic(), self.job_of(trial), self.run_of(trial)
        session = self._sessions.of(trial)
        if not run.recipe.exists():
            run.path.mkdir(parents=True, exist_ok=True)
            write_file(run.recipe, dump_recipe(job.recipe))
        identity = yield from identity_of(job.recipe, job.prepared, job.folder)
        run.write_identity(identity)
        job = replace(job, prepared=(yield from self._referred(trial, session)))
        yield from stoppable(head_first(job, session, run), self._by, "training the head")
        untrained = yield from self._measured(session, job.prepared)
        saved, _ = load_newest(run.checkpoints)
        checkpoints = Checkpoints(run.checkpoints, identity)
        trainer, _ = yield from ready_trainer(job, session, run, checkpoints, saved, self._by)
        at = saved.state.step if saved else 0
        self._start = time.monotonic() - began
        if at < steps:
            known = None if job.recipe.lora.start_from else untrained
            at = yield from self._steps(trial, trainer, run, at, steps, known)
        finished = trainer.state.stopped_early or at >= trainer.plan.steps
        loss = trainer.state.best_loss
        if not finished and trainer.state.validations[-1].step < at:
            limit, pairs, title = trainer.state.micro_tokens, pair_loss(job.recipe), self._title(trial, "compared")
            with trainer.average.within(session):
                loss = min(loss, (yield from mean_loss(session, job.prepared.valid.examples, limit, pairs, title)))
        return at, loss if math.isfinite(loss) else None, finished

    def _referred(self, trial: int, session: Session) -> Generator[Event, None, Prepared]:
        """The rows, pairs with their references; of the test rows none, which the winner's own run reads first."""
        if (shape := self._sessions.shape(trial)) not in self._rows:
            untested = replace(self.job, prepared=replace(self.job.prepared, test=None))
            self._rows[shape] = yield from stoppable(with_references(untested, session), self._by, "scoring the pairs")
        return self._rows[shape]

    def _steps(
        self, trial: int, trainer: Trainer, run: RunFolder, done: int, steps: int, untrained: Evaluation | None
    ) -> Generator[Event, None, int]:
        """The last step that is done. Raises Interrupted where somebody else asks to stop."""
        at = done
        with MetricsFile(run.metrics) as metrics:
            metrics.truncate_after(done if done else -1)
            try:
                for event in trainer.events(untrained):
                    metrics.record(event)
                    if isinstance(event, StepDone):
                        at = event.step
                        yield Progress(0, self._title(trial, "training"), at, min(steps, trainer.plan.steps))
                    here = at >= steps and (isinstance(event, Validated) or not trainer.plan.evaluates_after(at))
                    trainer.stopping = self._by.stopping or here
            except Interrupted:
                if self._by.stopping:
                    raise
        return at

    def _title(self, trial: int, what: str) -> str:
        return f"trial {trial + 1}: {what}"

    def _measured(self, session: Session, prepared: Prepared) -> Generator[Event, None, Evaluation]:
        """The base, or the head alone, on the validation rows: the first validation of every trial."""
        if self._base is None:
            began, limit, pairs = time.monotonic(), self.job.recipe.train.tokens_at_once, pair_loss(self.job.recipe)
            work = evaluate(session, prepared, prepared.valid, name="base model", micro_tokens=limit, pairs=pairs)
            self._base = yield from stoppable(work, self._by, "measuring the base model")
            if self.ledger.base_seconds is None:
                measuring = time.monotonic() - began
                rows = len(self.job.prepared.held_out.examples) / len(prepared.valid.examples)
                predicted = sum(look_ahead(self.job, session, Questions()).parts.get(part, 0.0) for part in AT_THE_END)
                self.ledger.last_seconds = round(max(2 * rows * measuring, predicted) * MEASURING, 3)
                self.ledger.base_seconds = round(time.monotonic() - began, 3)  # no trial but the first takes it
        return self._base
