"""Commands that load several models one after the other hold one at a time, without waiting for Python's collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, Session
from backends.model_folder import ModelFolder
from finetune.commands import duel
from finetune.disk.run_folder import RunFolder
from finetune.training.search_sessions import TrialSessions
from finetune.training.search_trials import Trial
from tests.conformance.toy import toy_batch
from tests.unit.toy_run import recipe


class Watched:
    """What is opened through it, and at each opening how many of the models before are still there."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.alive: list[int] = []
        self._backend, self._spec = backend, ModelSpec(folder, dtype="float32", folder=ModelFolder.open(folder))
        self._layers: list[weakref.ref[Any]] = []

    def open(self, rank: int = 4) -> Session:
        self.alive.append(sum(layer() is not None for layer in self._layers))
        session: Any = registry.load(self._backend).open(self._spec, LoraSpec(rank, 8.0), OptimSpec(), 0)
        session.step([toy_batch()], 1e-3)
        model = session._model if self._backend == "torch" else session._forward.model
        self._layers.append(weakref.ref(model.model.layers[0].self_attn.q_proj))
        return session  # type: ignore[no-any-return]


@pytest.fixture(params=["torch", "mlx"])
def watched(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Watched]:
    if reason := registry.probe(request.param):
        pytest.skip(reason)
    gc.disable()
    yield Watched(request.param, tiny_folder)
    gc.enable()


def test_without_freeing_a_dropped_model_stays(watched: Watched) -> None:
    """What the other tests would miss if no model had circles."""
    for _ in range(2):
        watched.open()
    assert watched.alive == [0, 1]


def test_a_search_holds_one_model(watched: Watched) -> None:
    trials = [Trial(rank=rank) for rank in (2, 3, 4)]
    sessions = TrialSessions(trials, lambda trial: watched.open(trials[trial].rank or 0))
    for trial in (0, 0, 1, 2):
        sessions.of(trial).score(toy_batch())
    sessions.close()
    watched.open()  # of the winner's own run
    assert watched.alive == [0, 0, 0, 0]


def test_backends_are_compared_one_after_the_other(
    watched: Watched, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "open_session", lambda *_: watched.open())
    for _ in range(3):
        registry.logprobs("any", ModelSpec(tiny_folder), LoraSpec(4, 8.0), OptimSpec(), 0, toy_batch())
    assert watched.alive == [0, 0, 0]


def test_a_duel_asks_one_model_after_the_other(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = SimpleNamespace(held_out=SimpleNamespace(examples=[SimpleNamespace(location="x:1", prompt="a")]))
    job = SimpleNamespace(folder=tmp_path, recipe=recipe(), prepared=rows, tokenizer=None)
    job.open = lambda adapter: watched.open()
    monkeypatch.setattr(duel, "ready_to_answer", lambda *_: (job, []))
    monkeypatch.setattr(duel, "with_progress", lambda work: work)
    monkeypatch.setattr(duel, "predict", lambda *_: [SimpleNamespace(predicted="b")])
    for name in ("read", "check_run_base", "read_trained"):
        monkeypatch.setattr(duel, name, lambda *_: None)
    names = ["one", "two", "three"]
    runs = [(RunFolder(tmp_path / name), recipe()) for name in names]
    (row,) = duel._of_file(runs, names, "new.jsonl", False, None)
    assert watched.alive == [0, 0, 0] and row.answers == dict.fromkeys(names, "b")
