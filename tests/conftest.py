"""Fixtures for all tests: tiny random models, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from backends.nvidia import driver

settings.register_profile("untimed", deadline=None)  # a busy machine must not fail a test
settings.load_profile("untimed")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for each other cost more than they do
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as the user would: each name of the hub was tried for half a minute
if driver() is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run without a card then


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes what finetune remembers for the user; commands in other processes inherit it."""
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["bridge", "own"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's products by numpy's BLAS where this machine needs it, and by MLX's own, as on a Mac."""
    pytest.importorskip("mlx.core")
    from backends.mlx_backend import blas_bridge

    if request.param == "own":
        monkeypatch.setattr(blas_bridge, "ENABLED", False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block random Llama with 128 tokens."""
    pytest.importorskip("torch")
    from tests.tiny_models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")
