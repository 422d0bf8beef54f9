"""One tiny model for all end-to-end tests, and a working folder for each module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backends import registry
from tests.end_to_end.command import Work, reviews


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    return model_with_tokenizer(tmp_path_factory.mktemp("end-to-end") / "model")


@pytest.fixture(scope="session")
def make_work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[], Work]:
    def make() -> Work:
        work = Work(tmp_path_factory.mktemp("work"), tiny_model)
        work.lines("train.jsonl", reviews(0, 26))
        work.lines("test.jsonl", reviews(100, 9))
        return work

    return make


@pytest.fixture
def work(make_work: Callable[[], Work]) -> Work:
    return make_work()


SLOW = {"reference": [pytest.mark.slow]}  # whole runs of it show little that those of the others do not


@pytest.fixture(scope="session", params=[pytest.param(name, marks=SLOW.get(name, [])) for name in registry.NAMES])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the registry names; skipped with the reason of its probe."""
    if reason := registry.probe(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)
