"""Names that say nothing alone are not parameters, fields, or names at module level."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.imports import ROOT

SAY_NOTHING = {"found", "one", "own", "place", "kept"}
FILES = sorted(file for package in ("backends", "finetune") for file in (ROOT / package).rglob("*.py"))


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every parameter, field of a class, and name at module level."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        if isinstance(node, ast.ClassDef | ast.Module):
            for statement in node.body:
                yield from _bound(statement)


def _bound(statement: ast.stmt) -> Iterator[tuple[int, str]]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.lineno, statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.lineno, target.id


def unclear(text: str) -> list[str]:
    return [f"{line}: {name}" for line, name in names(ast.parse(text)) if name in SAY_NOTHING]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_name_says_what_it_holds(file: Path) -> None:
    assert unclear(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    ["def read(found): ...", "kept = 1", "def place(): ...", "class A:\n    own: int", "read = lambda one: one"],
)
def test_a_name_that_says_nothing_is_found(planted: str) -> None:
    assert len(unclear(planted)) == 1
