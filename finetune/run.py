"""One run from recipe to report: evaluate the base model, train, keep the adapter, evaluate the tuned model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.interface import FloatArray, Session, TrainState
from backends.streaming import STREAMED
from finetune import connections
from finetune.check.check_file import leaked_into
from finetune.check.run_analysis import analysing, questions_of
from finetune.check.run_records import Records
from finetune.check.verdict import headline
from finetune.data.limit import limit_notes
from finetune.disk.adapter import check_base, check_start
from finetune.disk.adapter_check import loadings
from finetune.disk.checkpoint import Checkpoints
from finetune.disk.held_out_rows import write_held_out
from finetune.disk.lock import Lock
from finetune.disk.metrics import MetricsFile, read
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.analysis import Questions
from finetune.evaluation.baselines import Words, bag_of_words
from finetune.evaluation.evaluate import Evaluation, base_weights, evaluate_held_out
from finetune.evaluation.leaked import leaked_rows
from finetune.evaluation.verdict import Watch, divergence, overfitting_verdict
from finetune.events import Event, Note, Validated, checked, stoppable
from finetune.recipe.specs import lora_spec
from finetune.report.report import Report, compare, load_evaluation, save_evaluation
from finetune.report.run_facts import facts_of
from finetune.report.run_times import Times
from finetune.report.summary import account_of, write_report
from finetune.training.head_first import HEAD_ALONE
from finetune.training.job import Job, known_validation
from finetune.training.loop import Trainer
from finetune.training.memory_settings import settle_memory
from finetune.training.predicted_time import look_ahead, sampler_of
from finetune.training.rate_race import Race
from finetune.training.ready_trainer import first_of_all, ready_trainer
from finetune.training.save_result import save_trained
from finetune.training.several_processes import Others
from finetune.training.suite_prompts import ask_suite

NOT_REPEATABLE = (
    "this model uses an operation that has no repeatable kernel on this device: the same run again, or a resumed one, "
    "will differ in the last digits"
)


@dataclass(frozen=True)
class Begun:
    """A run that is ready for its next step."""

    trainer: Trainer
    resumed_after: int | None  # the step of the checkpoint; None: the run has done nothing yet
    base: Evaluation | None  # None where the recipe asks for none
    findings: Mapping[str, Any]  # what `finetune check` found in the data
    words: Words | None  # how good the words alone are
    times: Times
    questions: Questions  # what is asked beside the held-out rows themselves
    race: Race | None  # None where the recipe names the learning rate
    head: Mapping[str, FloatArray] | None  # the head that learned alone; None where the recipe has none


class Run:
    """One run, new or resumed. `events` does all of it.

    To end it early set `stopping`, between two events: the work in hand ends, with a checkpoint where steps have been
    done, and Interrupted is raised.
    """

    def __init__(self, job: Job, folder: RunFolder, lock: Lock | None = None, others: Others | None = None) -> None:
        self.job, self.folder, self.lock, self.others = job, folder, lock, others
        self.stopping = False
        self._records = Records(job, folder, self)

    def events(self, resume: bool = False) -> Generator[Event, None, Report]:
        """Everything that happens, to the report. Raises Interrupted, FinetuneError, and errors of the backend.

        Between two events the run's folder and the model must be what they were, and nothing may have tried to connect.
        """
        return (yield from checked(self._events(resume), self._check_surroundings))

    def _check_surroundings(self) -> None:
        connections.check()
        if self.lock:
            self.lock.check()
        self.job.check_model()

    def _events(self, resume: bool) -> Generator[Event, None, Report]:
        if self.lock and self.lock.note:
            yield Note(0, self.lock.note)
        begun = yield from self.begin(resume)
        yield from self.train(begun)
        self.keep(begun.trainer)
        return (yield from self.report(begun))

    def begin(self, resume: bool) -> Generator[Event, None, Begun]:
        """All that comes before training: the run's records, its data checked, its model loaded and evaluated.

        Raises Incompatible where `resume` finds a run that began with something else, or the adapter to start from
        does not fit.
        """
        job, folder = self.job, self.folder
        unsettled = job.recipe.train.gradient_checkpointing == "auto"
        self._records.recomputed = folder.recomputed() if resume and unsettled else None
        identity, saved = yield from self._records.identity(resume)
        start = Path(job.recipe.lora.start_from) if job.recipe.lora.start_from else None
        if start:
            check_base(start, job.folder, job.recipe.model.path)
            check_start(start, job.folder, lora_spec(job.recipe))
        folder.write_identity(identity)
        self._records.write_environment()
        write_held_out(folder, job.prepared)
        folder.write_json("data.json", account_of(job.prepared))
        findings = yield from self._records.checked_data()
        asked = questions_of(job)
        job.prepared.forget_records()
        settled = yield from settle_memory(
            replace(job, streamed=False) if self.others else job, self._records.recomputed
        )
        self._records.recomputed = settled.recipe.train.gradient_checkpointing is True if unsettled else None
        session = self.others.open(settled, folder) if self.others else settled.open()
        self._records.write_environment(session)
        yield (ahead := look_ahead(settled, session, asked))
        times = Times.of(folder, ahead)
        prepared, head = yield from times.watching(first_of_all(settled, session, folder, self))
        if prepared is not job.prepared:
            self.job, settled = replace(job, prepared=prepared), replace(settled, prepared=prepared)
        base = yield from self._evaluate_base(session, times)
        words = bag_of_words(job.prepared, folder.words) if base else None
        checkpoints = Checkpoints(folder.checkpoints, identity)
        ready = ready_trainer(settled, session, folder, checkpoints, saved, self)
        trainer, race = yield from times.watching(ready)
        return Begun(
            trainer, None if saved is None else saved.state.step, base, findings, words, times, asked, race, head
        )

    def train(self, begun: Begun) -> Iterator[Event]:
        """All steps that are left; metrics.jsonl records them. Raises Interrupted, Diverged, MemoryExhausted."""
        trainer, step, repeatable = begun.trainer, begun.resumed_after, True
        sampler = sampler_of(self.job)
        watch = Watch(self.job.folder.vocabulary, trainer.plan.warmup, trainer.state.history())
        with MetricsFile(self.folder.metrics) as metrics:
            metrics.truncate_after(-1 if step is None else step)
            if step is not None and (lost := metrics.missing(step)):
                without = f"{self.folder.metrics} has lost {lost} of the {step} steps done"
                yield Note(step, f"{without}; the loss curve will lack them")
            yield from trainer.state.history()  # so that the table on the screen is whole
            for event in trainer.events(known_validation(self.job, begun.base)):
                metrics.record(event)
                yield event
                if isinstance(event, Validated) and trainer.validated:
                    with trainer.average.within(trainer.session):
                        yield from sampler.samples(trainer.session, event.step, trainer.validated)
                if notice := watch.look(event):
                    yield Note(event.step, notice)
                if repeatable and not trainer.session.repeatable:
                    repeatable = False
                    self._records.write_environment(trainer.session)
                    yield Note(event.step, NOT_REPEATABLE)
                trainer.stopping = self.stopping

    def keep(self, trainer: Trainer) -> None:
        """What the best validation was of: into the session, and into the run's folder."""
        assert trainer.best is not None  # the validation before the first step is always a best one
        step = trainer.state.best_step
        trainer.session.set_state(TrainState(step, trainer.best, {}))
        save_trained(self.job, self.folder, trainer.best, trainer.session, step)

    def report(self, begun: Begun) -> Generator[Event, None, Report]:
        """The tuned model evaluated, and the report written. Raises Interrupted, Diverged."""
        job, session = self.job, begun.trainer.session
        with begun.times.measuring("tuned model", self.folder):
            tuned = yield from self._evaluate(session, "tuned model")
        save_evaluation(self.folder.evaluation("tuned"), tuned)
        with begun.times.measuring("errors", self.folder):
            errors = analysing(job, session, begun.questions, begun.base, tuned, begun.head)
            analysis = yield from stoppable(errors, self, "analysing the errors")
        suite = None
        if job.suite is not None:
            with begun.times.measuring("suite", self.folder):
                asking = ask_suite(job, job.suite, session, begun.head)
                suite = yield from stoppable(asking, self, "asking the suite")
        report = replace(self._figures(begun, tuned), analysis=analysis, suite=suite)
        write_report(self.folder, report)
        return report

    def _figures(self, begun: Begun, tuned: Evaluation) -> Report:
        job, trainer = self.job, begun.trainer
        validations = tuple(trainer.state.history())
        kind = "test" if job.prepared.test else "validation"
        events = read(self.folder.metrics)
        return Report(
            run=str(self.folder.path),
            facts=facts_of(
                job,
                events,
                trainer.session.device,
                processes=self.others.here.size if self.others else 1,
                streamed=STREAMED in trainer.session.shortcuts,
            ),
            times=begun.times.of_events(events),
            adapter=str(self.folder.trained),
            loads=() if job.recipe.method == "full" else loadings(self.folder.adapter, job.folder),
            backend=job.backend,
            device=trainer.session.device,
            scheme=trainer.session.scheme,
            check=headline(begun.findings),
            held_out=f"{len(job.prepared.held_out.examples)} {kind} rows{HEAD_ALONE if begun.head else ''}",
            base=begun.base,
            tuned=tuned,
            comparison=compare(begun.base, tuned, begun.words) if begun.base else None,
            leaked=leaked_rows(begun.base, tuned, leaked_into(begun.findings, job.prepared.held_out.name)),
            overfitting=overfitting_verdict(validations, trainer.plan.open_end and trainer.state.stopped_early),
            divergence=divergence(events, job.folder.vocabulary, trainer.plan.warmup),
            validations=validations,
            best_step=trainer.state.best_step,
            limited=limit_notes(job.prepared),
            race=begun.race,
        )

    def _evaluate_base(self, session: Session, times: Times) -> Generator[Event, None, Evaluation | None]:
        """The base model on the held-out rows: evaluated once per run, and kept for a resumed one."""
        if not self.job.recipe.evaluate.base:
            return None
        expected = [example.answer for example in self.job.prepared.held_out.examples]
        saved = load_evaluation(self.folder.evaluation("base"), expected)
        if saved and (saved.compared == self.job.recipe.evaluate.answer or self.job.prepared.task != "generation"):
            return saved
        with base_weights(session), times.measuring("base model", self.folder):
            base = yield from self._evaluate(session, "base model")
        save_evaluation(self.folder.evaluation("base"), base)
        return base

    def _evaluate(self, session: Session, name: str) -> Generator[Event, None, Evaluation]:
        job = self.job
        evaluation = evaluate_held_out(session, job.recipe, job.prepared, job.tokenizer, name)
        return (yield from stoppable(evaluation, self, f"evaluating the {name}"))
