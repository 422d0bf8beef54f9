"""Windows refuses a rename or a removal while a virus scanner or an indexer reads the file: it is tried again."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.disk import atomic
from finetune.errors import DiskError


def refusing(real: Callable[..., Any], times: int) -> Callable[..., Any]:
    left = [times]

    def work(*arguments: Any, **rest: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return real(*arguments, **rest)

    return work


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_TRIES", 20)
    monkeypatch.setattr(atomic, "_PAUSE", 0.0)


def written(folder: Path) -> None:
    with atomic.new_folder(folder) as making:
        (making / "part").write_text("new")


def test_a_file_that_is_held_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")
    monkeypatch.setattr(Path, "replace", refusing(Path.replace, 19))
    atomic.write_file(tmp_path / "report.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "new")]


def test_a_folder_that_is_held_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "part").write_text("old")
    monkeypatch.setattr(Path, "replace", refusing(Path.replace, 5))
    monkeypatch.setattr(shutil, "rmtree", refusing(shutil.rmtree, 5))
    written(tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step" / "part").read_text() == "new"


def test_a_file_that_stays_held_is_said_and_the_old_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("old")
    monkeypatch.setattr(Path, "replace", refusing(Path.replace, 20))
    with pytest.raises(DiskError, match="permission"):
        atomic.write_file(tmp_path / "report.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def test_elsewhere_a_refusal_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_TRIES", 1)
    monkeypatch.setattr(Path, "replace", refusing(Path.replace, 1))
    with pytest.raises(DiskError, match="permission"):
        written(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []
