"""Data-parallel runs: rank 0 opens the run, the other processes join it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.interface import BackendError, Lost, Session
from backends.process_group import Group, ProcessRank, SharedSession, join, lead, led
from finetune.data.rows import Example
from finetune.disk.base_model import base_model, fingerprint
from finetune.disk.run_folder import RunFolder
from finetune.disk.shared_rows import content_of, read_rows, remove_rows, write_rows
from finetune.errors import ExitCode, FinetuneError, Incompatible, RecipeError, explain
from finetune.events import result_of
from finetune.recipe.schema import Recipe
from finetune.training.job import Job, find_folder, open_model
from finetune.training.step_shares import share_of


class OtherFailed(FinetuneError):
    """Another process could not begin; it has its exit code."""

    def __init__(self, rank: int, message: str, code: int) -> None:
        super().__init__(f"process {rank}: {message}")
        self.exit_code = ExitCode(code)


@dataclass
class Others:
    """The other processes of this run, seen from the first one."""

    group: Group
    here: ProcessRank
    _session: SharedSession | None = field(default=None, repr=False)
    _orders_sent: bool = field(default=False, repr=False)  # what to open

    @property
    def asked(self) -> int:
        """The signal that asked one of them to stop, or 0."""
        return self._session.team.heard if self._session else 0

    def open(self, job: Job, folder: RunFolder) -> SharedSession:
        """The model in every process, at the same time. Raises as `Job.open`, OtherFailed, and Lost."""
        order = {
            "folder": str(folder.path.absolute()),
            "rows": write_rows(folder.path, job.prepared.train.examples),
            "base": fingerprint(result_of(base_model(job.folder))),
            "recipe": job.recipe.model_dump(mode="json"),
        }
        self._orders_sent = True
        self.group.broadcast(json.dumps(order).encode())
        _shared_content(self.group, folder.path)
        answer: dict[str, Any] = {"failed": "it has ended", "code": ExitCode.BUG}
        try:
            session, answer = job.open(), {}
        finally:
            answers = _gathered(self.group, answer)
            remove_rows(folder.path)
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise OtherFailed(rank, answer["failed"], answer["code"])
        self._session = lead(session, self.group, self.here.local_size)
        return self._session

    def end(self) -> None:
        """The others end. Raises Lost."""
        if self._session is not None:
            self._session.end()
        elif not self._orders_sent:
            self.group.broadcast(b"{}")


def joined(recipe: Recipe, here: ProcessRank) -> tuple[Recipe, Group]:
    """The recipe on the backend whose launcher started this process, and its group.

    Raises BackendError, RecipeError, Lost.
    """
    if recipe.backend not in ("auto", here.backend):
        started = f"this process was started for the backend {here.backend}"
        raise BackendError(f"{started}, and the recipe says backend: {recipe.backend}; make them agree")
    for key in ("head", "preferences"):
        if getattr(recipe, key) is not None:
            raise RecipeError(f"{key}: runs in one process so far; leave --devices away")
    return recipe.model_copy(update={"backend": here.backend}), join(here, recipe.device)


@contextmanager
def leading(group: Group, here: ProcessRank) -> Iterator[Others]:
    """In the first process: at the end the others are told so, unless one is gone, or this one is to end at once."""
    others = Others(group, here)
    try:
        yield others
    except (Lost, KeyboardInterrupt):
        raise
    except BaseException:
        with suppress(Lost):
            others.end()
        raise
    others.end()
    group.close()


def work_along(recipe: Recipe, group: Group, stop: Callable[[], int]) -> None:
    """In every process but the first, to its end. recipe: as this process read it, with its own model folder.

    stop: the signal that asked this process to stop, or 0. Raises Lost.
    """
    order = json.loads(group.broadcast(None))
    if not order:
        return
    content = _shared_content(group, Path(order["folder"]))
    answer: dict[str, Any] = {}
    try:
        session, rows = _begin(recipe, order, content)
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        answer = {"failed": said[0], "code": said[1]}
    if any("failed" in one for one in _gathered(group, answer)):
        return  # the first process says it
    led(session, group, stop, lambda cut: share_of(rows, cut, group.rank, group.size))
    group.close()


def _shared_content(group: Group, folder: Path) -> bytes:
    """Of the file with the rows: from the run's folder, or told by the first process where a machine lacks it."""
    content = content_of(folder)
    if all(one["there"] for one in _gathered(group, {"there": content is not None})):
        assert content is not None
        return content
    return group.broadcast(content if group.rank == 0 else None)


def _begin(recipe: Recipe, order: dict[str, Any], content: bytes) -> tuple[Session, Sequence[Example]]:
    """The model of this machine and the rows of the run. Raises Incompatible where the model is another."""
    first = Recipe.model_validate(order["recipe"])
    model = recipe.model.model_copy(update={"dtype": first.model.dtype})
    own = first.model_copy(update={"model": model, "backend": recipe.backend, "device": recipe.device})
    folder = find_folder(own)
    if fingerprint(result_of(base_model(folder))) != order["base"]:
        raise Incompatible(f"{folder.path}: not the model that process 0 has; put the same files there")
    rows = read_rows(content, order["rows"])
    return open_model(own, folder, own.backend), rows


def _gathered(group: Group, answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(one) for one in group.gather(json.dumps(answer).encode())]
