"""Another process answers for this one: the same answers, the same refusals, and a word where it is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import registry
from backends import registry_process as apart_module
from backends.interface import BackendError, LoraSpec, ModelSpec, OutOfMemory
from backends.registry_process import Apart
from finetune.errors import ExitCode, explain


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


@pytest.mark.parametrize("kind", [OutOfMemory, MemoryError])
def test_a_lack_of_memory_is_one_here_and_ends_nothing(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the other process comparing the backends, and nothing else, needs more memory than there is."""
    planted = f"class Full({kind.__name__}): pass\ndef full(*_): raise Full('no room for 3 GB')\n"
    start = "from backends.interface import OutOfMemory\n" + planted + "registry.logprobs = full\nown.serve(registry)"
    code = apart_module._CODE.replace(
        "; own.serve(registry)", "\nexec({planted!r})".replace("{planted!r}", repr(start))
    )
    monkeypatch.setattr(apart_module, "_CODE", code)
    short = Apart()
    for _ in range(2):
        with pytest.raises(kind, match="no room for 3 GB") as caught:
            short.answer(short.ask("logprobs", "reference"))
        said = explain(caught.value)
        assert said is not None and said[1] == ExitCode.MEMORY
    assert short.answer(short.ask("choose", "reference")) == "reference"
    short.end()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_process_that_the_system_kills_had_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart_module, "_CODE", "import os; {path!r}; os.kill(os.getpid(), 9)")
    killed = Apart()
    with pytest.raises(OutOfMemory, match="memory runs out"):
        killed.answer(killed.ask("probe", "reference"))
    killed.end()
