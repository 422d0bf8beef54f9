"""Files a run writes before it trains: identity, environment, data findings."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from backends import registry
from backends.interface import Session
from backends.process_group import side_by_side
from finetune.check.check_file import read_findings
from finetune.check.show import as_text
from finetune.check.survey import as_json, survey
from finetune.disk.atomic import write_file
from finetune.disk.checkpoint import Checkpoint, load_newest
from finetune.disk.identity import check_identity, identity_of, read_identity
from finetune.disk.run_folder import ENVIRONMENT, RunFolder, environment
from finetune.events import Event, Note, Stoppable, stoppable
from finetune.training.job import Job


class Records:
    """Of one run, which `by` may stop."""

    def __init__(self, job: Job, folder: RunFolder, by: Stoppable) -> None:
        self._job, self._folder, self._by = job, folder, by
        self.recomputed: bool | None = None  # whether blocks are; None: as the recipe says, or not decided yet

    def write_environment(self, session: Session | None = None) -> None:
        """environment.json: at first without what the session says, since opening one may crash."""
        backend = self._job.backend
        facts = environment(backend, registry.describe(backend, self._job.recipe.device))
        facts["remote_code"] = self._job.recipe.model.remote_code
        if self.recomputed is not None:
            facts["recomputed"] = self.recomputed
        if session:
            facts |= {"shortcuts": list(session.shortcuts), "repeatable": session.repeatable}
            facts |= {"processes": side_by_side(session)} if side_by_side(session) > 1 else {}
        self._folder.write_json(ENVIRONMENT, facts)

    def identity(self, resume: bool) -> Generator[Event, None, tuple[Mapping[str, Any], Checkpoint | None]]:
        """The run's, of the kind that it began with, and its newest checkpoint. Raises Incompatible if they differ."""
        earlier = read_identity(self._folder.path) if resume else None
        if earlier or not resume:  # it is there before any checkpoint, as the evaluated base may be
            identity = yield from self._reading(earlier)
        if not resume:
            return identity, None
        saved, messages = load_newest(self._folder.checkpoints)
        for message in messages:
            yield Note(0, message)
        if not earlier:
            return (yield from self._reading(saved.identity if saved else None)), saved
        if saved is not None:
            check_identity(saved.identity, identity)
        return identity, saved

    def _reading(self, known: Mapping[str, Any] | None) -> Generator[Event, None, Mapping[str, Any]]:
        """What the run is now. Raises Incompatible where that is not `known`; Interrupted."""
        job = self._job
        reading = identity_of(job.recipe, job.prepared, job.folder, like=known)
        identity = yield from stoppable(reading, self._by, "reading the model")
        if known is not None:
            check_identity(known, identity)
        return identity

    def checked_data(self) -> Generator[Event, None, Mapping[str, Any]]:
        """`finetune check` of the run's data, in check.txt and check.json, which a resumed run finds."""
        job, folder = self._job, self._folder
        if recorded := read_findings(folder.path / "check.json"):
            return recorded
        survey_of_rows = survey(job.recipe, job.prepared, job.folder, job.tokenizer)
        findings = yield from stoppable(survey_of_rows, self._by, "checking the data")
        write_file(folder.path / "check.txt", as_text(findings, job.tokenizer))
        values = as_json(findings, job.tokenizer)
        folder.write_json("check.json", values)  # last: it says that both are there
        return values
