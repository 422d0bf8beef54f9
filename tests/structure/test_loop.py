"""The training loop says what happens and is told nothing back but `stopping`: no callbacks, four fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from finetune.training import loop
from finetune.training.loop import Trainer


def words(source: str) -> set[str]:
    """Every name, attribute, imported name and argument of a file; words in strings and comments do not count."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name, node.asname or node.name}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


CALLBACKS = {"Callable", "callable", "Protocol", "send", "throw"}


def test_nothing_is_handed_to_the_loop_to_be_called() -> None:
    assert not words(inspect.getsource(loop)) & CALLBACKS


def test_the_trainer_is_made_of_four_things() -> None:
    names = ["session", "prepared", "recipe", "checkpoints"]
    assert [field.name for field in dataclasses.fields(Trainer)] == names
    assert list(inspect.signature(Trainer).parameters) == names


@pytest.mark.parametrize(
    "source",
    [
        "from collections.abc import Callable",
        "from collections import abc\nreport: abc.Callable[[], bool]",
        "from typing import Callable as Report",
    ],
)
def test_a_planted_callback_is_found(source: str) -> None:
    assert words(source) & CALLBACKS
