"""The one table of exit codes: every error of ours has its row, and every row says what it means."""

from __future__ import annotations

import signal

import pytest

from backends.interface import BackendError, IncompatibleState, OutOfMemory
from finetune import cli, errors
from finetune.errors import ExitCode, FinetuneError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FinetuneError)]


def test_every_code_has_a_name_and_a_meaning() -> None:
    rows = [(code.value, code.name, code.meaning) for code in ExitCode]
    assert len(rows) == 13
    assert all(meaning and not meaning.endswith(".") for _, _, meaning in rows)
    assert len({meaning for *_, meaning in rows}) == len(rows)


def test_a_signal_ends_with_128_more_than_its_number() -> None:
    assert ExitCode.INTERRUPTED == 128 + signal.SIGINT
    assert ExitCode.TERMINATED == 128 + signal.SIGTERM


def test_no_two_kinds_of_errors_end_alike() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert sorted(codes) == list(range(1, 11))


def ended(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code and standard error of a command that raises `error`."""

    def app(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_ends_with_the_code_of_the_error(
    kind: type[FinetuneError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(kind("a: b"), monkeypatch, capsys) == (kind.exit_code, "finetune: a: b\n")


@pytest.mark.parametrize(
    ("error", "code"), [(BackendError("x"), 7), (IncompatibleState("x"), 8), (OutOfMemory("x"), 5), (MemoryError(), 5)]
)
def test_errors_from_behind_the_boundary_have_codes_too(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error, monkeypatch, capsys)[0] == code


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError(), monkeypatch, capsys)
