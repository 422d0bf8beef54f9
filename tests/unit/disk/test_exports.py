"""A run remembers the exports that were made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.disk.exports import FILE, Made, remember, write_report
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible


def made(folder: Path, verified: str = "error 1e-5") -> Made:
    folder.mkdir(exist_ok=True)
    return Made(str(folder), "f16", verified, [f"serve {folder}"], ["a note"])


def test_each_export_stands_once_in_the_report_and_among_the_commands(tmp_path: Path) -> None:
    run, report = RunFolder(tmp_path), tmp_path / "report.txt"
    report.write_text("figures\n")
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    for one in (first, second, made(tmp_path / "a", "error 2e-5")):
        remember(run, one)
    assert report.read_text().startswith("figures\n") and report.read_text().count(str(tmp_path / "a")) == 1
    assert "error 2e-5" in report.read_text() and "error 1e-5" in report.read_text()
    commands = (tmp_path / "exports.txt").read_text()
    assert [f"serve {tmp_path / name}" in commands for name in "ab"] == [True, True] and "note: a note" in commands


def test_an_export_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    remember(run, made(tmp_path / "a"))
    (tmp_path / "a").rmdir()
    remember(run, made(tmp_path / "b"))
    assert str(tmp_path / "a") not in (tmp_path / "exports.txt").read_text()
    assert not (tmp_path / "report.txt").exists()


def test_a_report_that_is_written_anew_keeps_the_exports_that_are_there(tmp_path: Path) -> None:
    run, report = RunFolder(tmp_path), tmp_path / "report.txt"
    write_report(run, "old figures\n")
    assert report.read_text() == "old figures\n"
    remember(run, made(tmp_path / "a"))
    gone = made(tmp_path / "b")
    remember(run, gone)
    (tmp_path / "b").rmdir()
    write_report(run, "new figures\n")
    told = report.read_text()
    assert told.startswith("new figures\n\nexports, each verified") and told.count(f"{tmp_path / 'a'} (f16)") == 1
    assert "old figures" not in told and gone.path not in told


@pytest.mark.parametrize("text", ["{", "{}", '[{"path": 1}]', "[1]"])
def test_what_no_run_writes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(text)
    with pytest.raises(Incompatible, match=r"exports\.json"):
        remember(RunFolder(tmp_path), made(tmp_path / "a"))
