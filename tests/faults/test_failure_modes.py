"""`FAILURE_MODES.md` is whole, and every test that it names is there and runs."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$")


def page() -> dict[int, tuple[str, list[str]]]:
    """Number -> what happens here, and the tests that hold it, as path::name."""
    text = (TESTS / "faults" / "FAILURE_MODES.md").read_text(encoding="utf-8")
    rows = [found for line in text.splitlines() if (found := ROW.match(line))]
    numbers = [int(row[1]) for row in rows]
    assert numbers == list(range(1, 45))
    return {int(row[1]): (row[3], re.findall(r"`([^`]+)`", row[4])) for row in rows}


NAMED = sorted({name for _, names in page().values() for name in names})


@functools.cache
def functions_in(file: Path) -> set[str]:
    """The test functions of a module, but for those that are always skipped."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        one.name
        for one in tree.body
        if isinstance(one, ast.FunctionDef)
        and one.name.startswith("test_")
        and not any(ast.unparse(mark).startswith("pytest.mark.skip(") for mark in one.decorator_list)
    }


def test_every_mode_has_a_test() -> None:
    assert [number for number, (_, names) in page().items() if not names] == []


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_is_there(name: str) -> None:
    file, test = name.split("::")
    assert Path(file).name.startswith("test_") and test in functions_in(TESTS / file)


@pytest.mark.slow
def test_pytest_collects_every_named_test() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow"]
    found = subprocess.run([*command, *NAMED], cwd=TESTS, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert {line.split("[")[0].split("tests/")[-1] for line in found.stdout.splitlines() if "::" in line} == set(NAMED)


def test_a_test_that_is_gone_is_noticed() -> None:
    with pytest.raises(AssertionError):
        test_a_named_test_is_there("faults/test_failure_modes.py::test_that_nobody_wrote")
