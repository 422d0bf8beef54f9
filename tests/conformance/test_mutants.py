"""The checks can fail: each planted fault is found by at least one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import reference
from tests.conformance.checks import CHECKS
from tests.conformance.mutants import FUNCTIONS, SESSIONS
from tests.conformance.toy import Case


def found_by(case: Case) -> str | None:
    """The first check that fails."""
    for name, check in CHECKS.items():
        try:
            check(case)
        except (AssertionError, pytest.fail.Exception):
            return name
        except Exception:  # a fault that makes the backend fall over is found, too
            return name
    return None


FAULTS = [*SESSIONS, *FUNCTIONS]


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] * (place % 2)) for place, fault in enumerate(FAULTS)]
)
@pytest.mark.filterwarnings("ignore:overflow|invalid value|divide by zero:RuntimeWarning")
def test_a_planted_fault_is_found(fault: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault in SESSIONS:
        monkeypatch.setattr(reference, "ReferenceSession", SESSIONS[fault])
    else:
        monkeypatch.setattr(reference, *FUNCTIONS[fault])
    assert found_by(Case("reference", tiny_folder))


def test_without_a_fault_nothing_is_found(tiny_folder: Path) -> None:
    assert found_by(Case("reference", tiny_folder)) is None
