"""Runs that were trained for a few steps, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from backends import registry
from finetune.disk.run_folder import RunFolder
from finetune.export import engine
from tests.tiny_models import model_with_tokenizer
from tests.unit.export.exported_run import Runs, trained_run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of llama.cpp wait for each other busily: on busy cores two take many times as long as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "processors", lambda: 1)
        yield


@pytest.fixture(scope="session")
def exportable_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its end token has a name that no program knows by itself."""
    folder = model_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")
    for file in folder.glob("*token*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("</s>", "<|fin|>"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def runs(exportable_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    @cache
    def train(backend: str, quantize: str, kind: str, held_out: int, method: str) -> RunFolder:
        if reason := registry.probe(backend):
            pytest.skip(reason)
        folder = tmp_path_factory.mktemp("run") / "work"
        sections = {"quantize": quantize, "method": method}
        return trained_run(folder, exportable_model, backend, kind, held_out, **sections)

    def run(
        backend: str, quantize: str = "none", kind: str = "classification", held_out: int = 12, method: str = "lora"
    ) -> RunFolder:
        return train(backend, quantize, kind, held_out, method)

    return run
