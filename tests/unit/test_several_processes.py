"""How a run of several processes begins: the same model and rows in each, or one message and one exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.interface import BackendError, Lost
from backends.process_rank import ProcessRank
from finetune.disk.run_folder import RunFolder
from finetune.disk.shared_rows import NAME
from finetune.errors import ExitCode, FinetuneError, RecipeError
from finetune.training import several_processes
from finetune.training.several_processes import Others, joined, leading, work_along
from tests.unit.threads import Room, ThreadGroup, reopened
from tests.unit.toy_run import model_folder, prepared, recipe, trainer

ROWS = prepared()


def base(weights: str) -> Iterator[Any]:
    yield from ()
    return {"weights": weights, "config.json": {}}


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Others]]:
    """The first of two processes opens the model of a run; the other does as the arguments say."""
    model_folder(tmp_path / "model")
    (tmp_path / "run").mkdir()
    room, first = Room(2), threading.get_ident()

    def here() -> bool:
        return threading.get_ident() == first

    def begin(weights: str = "w", fails: Exception | None = None, sees: bool = True) -> tuple[Any, Others]:
        def find(_: Any) -> Any:
            if fails is not None:
                raise fails
            return SimpleNamespace(path=tmp_path / "elsewhere")

        content_of = several_processes.content_of
        monkeypatch.setattr(several_processes, "find_folder", find)
        monkeypatch.setattr(several_processes, "base_model", lambda folder: base("w" if folder is None else weights))
        monkeypatch.setattr(several_processes, "open_model", lambda *_: reopened(tmp_path))
        monkeypatch.setattr(several_processes, "content_of", lambda path: content_of(path) if sees or here() else None)
        other = threading.Thread(target=work_along, args=(recipe(), ThreadGroup(room, 1), int), daemon=True)
        other.start()
        job: Any = SimpleNamespace(prepared=ROWS, folder=None, recipe=recipe(), open=lambda: reopened(tmp_path))
        with leading(ThreadGroup(room, 0), ProcessRank(0, 2, 0, 2)) as others:
            session = others.open(job, RunFolder(tmp_path / "run"))
            list(trainer(tmp_path, session, rows=ROWS).events())
        other.join()
        return session, others

    return begin


@pytest.mark.parametrize("sees", [True, False])
def test_the_others_have_the_rows_also_where_they_do_not_see_the_folder(
    tmp_path: Path, begun: Callable[..., tuple[Any, Others]], sees: bool
) -> None:
    session, others = begun(sees=sees)
    assert session.get_state().step == 8 and others.asked == 0
    assert not (tmp_path / "run" / NAME).exists()
    alone = trainer(tmp_path / "alone", rows=ROWS)
    list(alone.events())
    ours, theirs = session.get_state().adapter, alone.session.get_state().adapter
    assert all(np.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize(
    ("told", "code", "says"),
    [
        ({"weights": "other"}, ExitCode.INCOMPATIBLE, "process 1: .*elsewhere: not the model that process 0 has"),
        ({"fails": RecipeError("model.path: no such folder")}, ExitCode.RECIPE, "process 1: model.path"),
        ({"fails": BackendError("no 4-bit here")}, ExitCode.BACKEND, "process 1: no 4-bit here"),
        ({"fails": MemoryError()}, ExitCode.MEMORY, "process 1: out of memory"),
    ],
)
def test_a_process_that_cannot_begin_ends_the_run_with_its_code(
    begun: Callable[..., tuple[Any, Others]], told: dict[str, Any], code: ExitCode, says: str
) -> None:
    with pytest.raises(FinetuneError, match=says) as error:
        begun(**told)
    assert error.value.exit_code == code


def test_a_run_that_fails_before_a_model_is_open_lets_the_others_go() -> None:
    room = Room(2)
    other = threading.Thread(target=work_along, args=(recipe(), ThreadGroup(room, 1), int), daemon=True)
    other.start()
    with pytest.raises(RecipeError), leading(ThreadGroup(room, 0), ProcessRank(0, 2, 0, 2)):
        raise RecipeError("data.train: none")
    other.join(10)
    assert not other.is_alive()


def test_who_has_lost_another_tells_nobody() -> None:
    group = SimpleNamespace(broadcast=lambda _: pytest.fail("it would wait for nothing"))
    with pytest.raises(Lost), leading(group, ProcessRank(0, 2, 0, 2)):  # type: ignore[arg-type]
        raise Lost("gone")


def test_a_recipe_of_another_backend_than_the_launcher_s_is_refused() -> None:
    with pytest.raises(BackendError, match="make them agree"):
        joined(recipe(backend="reference"), ProcessRank(0, 2, 0, 2, "another"))


@pytest.mark.parametrize(("ending", "code"), [("leave()", 0), ("", -signal.SIGABRT)])
def test_a_process_that_has_done_its_part_ends_whatever_libraries_do_at_the_end(ending: str, code: int) -> None:
    """As gloo's threads may: what is registered here aborts an interpreter that ends."""
    begins = "import atexit, os; from finetune.commands.train import leave; atexit.register(os.abort); print('done')"
    done = subprocess.run([sys.executable, "-c", f"{begins}; {ending}"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert not ending or done.stdout == "done\n", "what was said is not lost"
