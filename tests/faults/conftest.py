"""The end-to-end tests' working folder and backends, for whole runs under faults."""

from __future__ import annotations

import os

import pytest

from tests.end_to_end.conftest import backend, make_work, tiny_model, work

__all__ = ["backend", "make_work", "tiny_model", "work"]


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing costs much time and shows nothing while the power stays on."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
