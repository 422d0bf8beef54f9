"""Another process answers for this one: the same answers, the same refusals, and a word where it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import registry
from backends import registry_process as apart_module
from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.registry_process import Apart


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    one = Apart()
    yield one
    one.end()


@pytest.fixture
def asked(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of this process asks the other one."""
    monkeypatch.setattr(apart_module, "_other", [apart])
    monkeypatch.setattr(registry, "load", lambda name: pytest.fail("this process loads a backend"))


def test_answers_are_those_of_this_process(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    here = registry.describe("reference"), registry.probe("reference"), registry.choose("reference")
    monkeypatch.setattr(apart_module, "_other", [apart])
    monkeypatch.setattr(registry, "load", lambda name: pytest.fail("this process loads a backend"))
    assert (registry.describe("reference"), registry.probe("reference"), registry.choose("reference")) == here


@pytest.mark.usefixtures("asked")
def test_refusals_are_those_of_this_process(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="there is no backend 'cuda'"):
        registry.choose("cuda")
    with pytest.raises(BackendError, match=r"config\.json"):
        registry.check_chosen("reference", ModelSpec(tmp_path), LoraSpec(4, 8.0))
    assert registry.choose("reference") == "reference"


def test_a_question_is_asked_once_and_may_be_asked_ahead(apart: Apart) -> None:
    first, second = apart.ask("probe", "reference"), apart.ask("choose", "reference")
    assert apart.ask("probe", "reference") == first
    assert apart.answer(second) == "reference"
    assert apart.answer(first) is None


def test_what_is_said_when_loading_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart_module, "_CODE", "import os; {path!r}; os._exit(3)")
    broken = Apart()
    with pytest.raises(BackendError, match=r"ended their process \(exit code 3\)"):
        broken.answer(broken.ask("probe", "reference"))
    broken.end()
